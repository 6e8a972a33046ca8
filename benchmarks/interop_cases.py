"""What benchmarks/interop.py times: each drop-in and the installed original, on the same tensors.

A case makes (leaves, call of a side): the call takes the leaves, by name, to a scalar that is differentiated.
Without leaves it works in place, on its attribute `tensors`.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Leaves = dict[str, Tensor]
Made = tuple[Leaves, Callable[[ModuleType], Callable[..., Tensor | None]]]


@dataclass(frozen=True)
class Case:
    """A drop-in at a batch that users run, and at one that the original has no memory for."""

    name: str
    library: str
    """What has to be installed."""
    original: str
    """The module that has the original."""
    make: Callable[[int, str], Made]
    rows: int
    shape: str
    """Of the inputs, with {} for the rows."""
    beyond: int = 0
    faster: float | None = None
    """Times as fast that ours is asked to be."""
    memory: float | None = None
    """Share of the original's memory that ours is asked to take at most."""
    rounds: int = 5

    def modules(self) -> dict[str, ModuleType]:
        return {
            "original": importlib.import_module(self.original),
            "sslfast": importlib.import_module(f"sslfast.interop.{self.library}"),
        }

    def size(self, rows: int) -> str:
        return self.shape.format(f"{rows:,}")


def rows_of(count: int, dim: int, device: str) -> Tensor:
    return torch.randn(count, dim, device=device)


def two_views(loss: Callable[[Any], Callable[..., Tensor]], dim: int = 128) -> Callable[[int, str], Made]:
    def make(rows: int, device: str) -> Made:
        a, b = torch.randn(2, rows, dim, device=device)
        return {"out0": a, "out1": a + b}, lambda m: loss(m)

    return make


def with_bank(rows: int, device: str) -> Made:
    a, b = torch.randn(2, rows, 128, device=device)

    def side(m: ModuleType) -> Callable[..., Tensor]:
        loss = m.NTXentLoss(0.1, (65536, 128)).to(device)
        state = torch.Generator(device).manual_seed(0)
        bank = F.normalize(torch.randn(65536, 128, device=device, generator=state), dim=1)

        def call(out0: Tensor, out1: Tensor) -> Tensor:
            if call.dtype != out0.dtype:
                loss.memory_bank.bank = bank.to(out0.dtype, copy=True)
                loss.memory_bank.bank_ptr.zero_()
                call.dtype = out0.dtype
            return loss(out0, out1)

        call.dtype = None
        return call

    return {"out0": a, "out1": a + b}, side


def dino(rows: int, device: str) -> Made:
    student, teacher = (torch.randn(views, rows, 65536, device=device) for views in (10, 2))

    def side(m: ModuleType) -> Callable[..., Tensor]:
        loss = m.DINOLoss().to(device)

        def call(student: Tensor) -> Tensor:
            loss.center = torch.zeros(1, 1, 65536, dtype=student.dtype, device=device)
            return loss(list(teacher.to(student.dtype)), list(student))

        return call

    return {"student": student}, side


def pairs(loss: str, dim: int = 128) -> Callable[[int, str], Made]:
    def make(rows: int, device: str) -> Made:
        a, b = torch.randn(2, rows, dim, device=device)
        leaves = {
            "image_features": F.normalize(a, dim=1), "text_features": F.normalize(b + 0.3 * a, dim=1),
            "logit_scale": torch.tensor(14.0, device=device),
        }  # fmt: skip
        if loss == "SigLipLoss":
            leaves["logit_bias"] = torch.tensor(-10.0, device=device)
        return leaves, lambda m: getattr(m, loss)()

    return make


def labelled(loss: str, classes: Callable[[int], int]) -> Callable[[int, str], Made]:
    """Embeddings of which each label has rows / classes."""

    def make(rows: int, device: str) -> Made:
        labels = torch.arange(rows, device=device) % classes(rows)
        x = rows_of(rows, 128, device) + rows_of(rows, 128, device)[labels]
        return {"embeddings": x}, lambda m: lambda embeddings: getattr(m, loss)()(embeddings, labels)

    return make


def memory_of_batches(rows: int, device: str) -> Made:
    """A full memory of 64 batches, 16 rows of it for each label."""
    slots = 64 * rows
    labels = torch.arange(slots, device=device) % (slots // 16)
    x, kept = rows_of(rows, 128, device), rows_of(slots, 128, device)

    def side(m: ModuleType) -> Callable[..., Tensor]:
        loss = m.CrossBatchMemory(m.NTXentLoss(), 128, slots).to(device)

        def call(embeddings: Tensor) -> Tensor:
            loss.embedding_memory, loss.label_memory = kept.to(embeddings.dtype), labels.clone()
            loss.has_been_filled, loss.queue_idx = True, 0
            return loss(embeddings, labels[:rows])

        return call

    return {"embeddings": x}, side


ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def texts(columns: int, **options: Any) -> Callable[[int, str], Made]:
    def make(rows: int, device: str) -> Made:
        topic = rows_of(rows, 384, device)
        leaves = {f"column{i}": topic + rows_of(rows, 384, device) for i in range(columns)}

        def side(m: ModuleType) -> Callable[..., Tensor]:
            loss = m.MultipleNegativesRankingLoss(nn.Identity(), **options)
            return lambda **x: loss.compute_loss_from_embeddings(list(x.values()), None)

        return leaves, side

    return make


class _Embedded(nn.Module):
    """In place of a model: the embeddings are the features."""

    tokenizer = max_seq_length = None

    def forward(self, features: dict) -> dict:
        return {"sentence_embedding": features["x"]}


def guided(rows: int, device: str) -> Made:
    topic = rows_of(rows, 384, device)
    leaves = {name: 0.4 * topic + rows_of(rows, 384, device) for name in ("anchor", "positive")}
    guide = [0.4 * topic + rows_of(rows, 384, device) for _ in leaves]

    def side(m: ModuleType) -> Callable[..., Tensor]:
        loss = m.GISTEmbedLoss.__new__(m.GISTEmbedLoss)
        nn.Module.__init__(loss)
        loss.model, loss.guide, loss.must_retokenize = _Embedded(), _Guide(guide), False
        loss.temperature, loss.similarity_fct = 0.05, nn.CosineSimilarity(dim=-1)
        loss.margin_strategy, loss.margin = "absolute", 0.0
        loss.contrast_anchors = loss.contrast_positives = True
        loss.gather_across_devices, loss.cross_entropy_loss = False, nn.CrossEntropyLoss()
        return lambda anchor, positive: loss([{"x": anchor}, {"x": positive}], None)

    return leaves, side


class _Guide(_Embedded):
    def __init__(self, columns: list[Tensor]) -> None:
        super().__init__()
        self.columns, self.turn = columns, 0

    def forward(self, features: dict) -> dict:
        self.turn += 1
        return {"sentence_embedding": self.columns[self.turn % 2 - 1].to(features["x"].dtype)}


def vit_base(device: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).to(device)


def average(update: Callable[[ModuleType, nn.Module], tuple[nn.Module, Callable]]) -> Callable:
    def make(rows: int, device: str) -> Made:
        model = vit_base(device)
        start = [p.detach().clone() for p in model.parameters()]

        def side(m: ModuleType) -> Callable[..., None]:
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), start)
                averaged, step = update(m, model)
                torch._foreach_add_(list(model.parameters()), 0.01)

            def call() -> None:
                step(model)

            call.tensors = list(averaged.parameters())
            return call

        return {}, side

    return make


def ema_v3(m: ModuleType, model: nn.Module) -> tuple[nn.Module, Callable]:
    average = m.ModelEmaV3(model, 0.99)
    return average, average.update


def update_momentum(m: ModuleType, model: nn.Module) -> tuple[nn.Module, Callable]:
    teacher = copy.deepcopy(model)
    return teacher, lambda student: m.update_momentum(student, teacher, 0.99)


def averaged_model(m: ModuleType, model: nn.Module) -> tuple[nn.Module, Callable]:
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=m.get_ema_multi_avg_fn(0.99))
    average.update_parameters(model)
    return average, average.update_parameters


def masking(rows: int, device: str) -> Made:
    tokens, noise = torch.randn(rows, 196, 768, device=device), torch.rand(rows, 196, device=device)
    config = SimpleNamespace(config=SimpleNamespace(mask_ratio=0.75))

    def side(m: ModuleType) -> Callable[..., Tensor]:
        method = m.ViTMAEEmbeddings.random_masking
        return lambda tokens: method(config, tokens, noise)[0].square().sum()

    return {"tokens": tokens}, side


L, C, P, S = (
    "lightly.loss",
    "open_clip.loss",
    "pytorch_metric_learning.losses",
    "sentence_transformers.losses",
)
PML, ST = "pytorch_metric_learning", "sentence_transformers"
VIT = "lightly", "lightly.models.utils", average(update_momentum), 1, "ViT-B"
CASES = (
    Case("lightly NTXentLoss", "lightly", L, two_views(lambda m: m.NTXentLoss(0.1)), 4096, "{} x 128",
         32768, faster=8),
    Case("lightly NTXentLoss, bank 65,536", "lightly", L, with_bank, 256, "{} x 128", 24576),
    Case("lightly DCLLoss", "lightly", L, two_views(lambda m: m.DCLLoss()), 4096, "{} x 128", 32768),
    Case("lightly DINOLoss", "lightly", L, dino, 8, "{} x (2 + 10) x 65,536"),
    Case("open_clip ClipLoss", "open_clip", C, pairs("ClipLoss"), 4096, "{} x 128", 32768,
         faster=2, memory=0.1),
    Case("open_clip SigLipLoss", "open_clip", C, pairs("SigLipLoss"), 4096, "{} x 128", 32768),
    Case("pytorch-metric-learning NTXentLoss", PML, P, labelled("NTXentLoss", lambda n: n // 2), 512,
         "{} x 128, 2 a class", 4096, faster=50),
    Case("pytorch-metric-learning SupConLoss", PML, P, labelled("SupConLoss", lambda n: 100), 4096,
         "{} x 128, 100 classes", 32768),
    Case("pytorch-metric-learning TripletMarginLoss", PML, P, labelled("TripletMarginLoss", lambda n: 32),
         512, "{} x 128, 32 classes", 4096),
    Case("pytorch-metric-learning CrossBatchMemory(NTXentLoss)", PML, P, memory_of_batches, 64,
         "{} x 128, 64 batches", 1024),
    Case("sentence-transformers MultipleNegativesRankingLoss", ST, S, texts(3), 2048,
         "{} x 384, a hard negative", 24576),
    Case("the same, all directions", ST, S, texts(2, directions=ALL_DIRECTIONS), 2048, "{} x 384", 16384),
    Case("sentence-transformers GISTEmbedLoss", ST, S, guided, 256, "{} x 384", 4096),
    Case("lightly update_momentum", *VIT),
    Case("timm ModelEmaV3", "timm", "timm.utils.model_ema", average(ema_v3), *VIT[3:]),
    Case("torch AveragedModel, EMA", "torch", "torch.optim.swa_utils", average(averaged_model), *VIT[3:]),
    Case("transformers ViTMAE random_masking", "transformers", "transformers.models.vit_mae.modeling_vit_mae",
         masking, 256, "{} x 196 x 768"),
)  # fmt: skip
