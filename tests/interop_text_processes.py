"""Tiny text models made offline, and what tests of sentence-transformers' losses run in several processes."""

import importlib
from pathlib import Path

import torch
from originals import evaluate, original
from torch import Tensor, nn

library = original("sentence_transformers")
losses = original("sentence_transformers.sentence_transformer.losses")
modules = original("sentence_transformers.sentence_transformer.modules")
transformers = original("transformers")
tokenizers = original("tokenizers")
interop = importlib.import_module("sslfast.interop.sentence_transformers")

WORDS = "the cat dog sat ran on mat hill red blue big small".split()
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
TEXTS = [
    ["the cat sat", "big dog", "red hill on the big mat", "cat", "blue", "the small dog ran", "big cat"],
    ["cat on mat", "the dog ran on", "red", "big red cat", "blue hill", "dog", "the cat the cat"],
    ["sat", "small blue cat sat on the hill", "blue", "dog ran", "big", "mat mat", "the hill"],
    ["hill", "cat", "small", "the", "on the hill ran the dog", "red red", "dog dog cat"],
    ["ran", "red cat", "the dog", "mat", "on", "sat", "big hill"],
]


def tokenizer(words: list[str] = WORDS, longest: int = 16):
    """Of whole words, [CLS] words [SEP]."""
    vocabulary = {w: i for i, w in enumerate([*SPECIAL.values(), *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=SPECIAL["unk"]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [(SPECIAL[k], vocabulary[SPECIAL[k]]) for k in ("cls", "sep")]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    names = {f"{k}_token": token for k, token in SPECIAL.items()}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=longest, **names)


def text_model(folder: Path, words: list[str] = WORDS, width: int = 8, longest: int = 16, dropout: float = 0):
    """A SentenceTransformer around a BERT of one layer with random weights, in float64."""
    torch.manual_seed(width)
    words_to_ids = tokenizer(words, longest)
    words_to_ids.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words_to_ids),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        initializer_range=0.4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    transformers.BertModel(config).save_pretrained(folder)
    parts = [modules.Transformer(str(folder)), modules.Pooling(width)]
    return library.SentenceTransformer(modules=parts, device="cpu").double()


class Columns(nn.Module):
    """A model whose sentences are embeddings already, under a key of the features."""

    max_seq_length = 16
    device = torch.device("cpu")

    def __init__(self, key: str, words_to_ids=None) -> None:
        super().__init__()
        self.key, self.tokenizer = key, words_to_ids

    def __getitem__(self, index: int) -> nn.Module:
        return self

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.key]}


def gist(module, **options):
    """A GISTEmbedLoss as a function of x0, x1, ... and the guide's g0, g1, ..."""
    words_to_ids = tokenizer()
    loss = module.GISTEmbedLoss(Columns("x", words_to_ids), Columns("g", words_to_ids), **options)

    def call(**given: Tensor) -> Tensor:
        count = len(given) // 2
        return loss([{k: given[f"{k}{i}"] for k in "xg"} for i in range(count)], None)

    return call


def ranking(module, **options):
    """A MultipleNegativesRankingLoss as a function of queries, documents and hard negatives."""
    loss = module.MultipleNegativesRankingLoss(Columns("x"), **options)
    return lambda **given: loss.compute_loss_from_embeddings(list(given.values()), None)


def cached_ranking(module, **options):
    loss = module.CachedMultipleNegativesRankingLoss(Columns("x"), **options)
    size = loss.mini_batch_size
    return lambda **given: loss.calculate_loss([list(x.split(size)) for x in given.values()])


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
TWO = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
HARDER = {"directions": ALL, "hardness_strength": 5.0}
GATHERED = {
    "default": (ranking, 2, {}),
    "hard negatives": (ranking, 4, {"scale": 3.0}),
    "dot product": (ranking, 3, {"directions": ALL, "similarity_fct": library.util.dot_score, "scale": 1.0}),
    "per direction": (ranking, 3, TWO),
    "all directions": (ranking, 4, {"directions": ALL}),
    "harder in batch": (ranking, 3, HARDER | {"hardness_mode": "in_batch_negatives"}),
    "harder own": (ranking, 4, HARDER | {"hardness_mode": "hard_negatives"}),
    "harder all": (ranking, 4, HARDER | {"hardness_mode": "all_negatives"}),
    "other similarity": (ranking, 3, {"directions": ALL, "similarity_fct": library.util.euclidean_sim}),
    "cached": (cached_ranking, 4, {"directions": ALL, "mini_batch_size": 2}),
    "cached per direction": (cached_ranking, 2, TWO | {"mini_batch_size": 3}),
    "GIST": (gist, 2, {}),
    "GIST, negatives, margin": (gist, 3, {"margin": 0.05, "temperature": 0.1}),
    "GIST, relative margin": (gist, 3, {"margin_strategy": "relative", "margin": 0.1, "temperature": 0.1}),
    "GIST, anchors only": (gist, 2, {"contrast_positives": False}),
    "GIST, positives only": (gist, 3, {"contrast_anchors": False}),
}


def gathered(rank: int) -> dict[str, list[tuple[Tensor, dict[str, Tensor]]]]:
    """[ours, original] of each case in float64: value, and gradients of this process's rows."""
    found = {}
    for name, (make, columns, options) in GATHERED.items():
        leaves = {f"x{i}": torch.randn(5, 6, dtype=torch.float64) for i in range(columns)}
        if make is gist:
            guides = {f"g{i}": torch.randn(5, 3, dtype=torch.float64) for i in range(columns)}
            guides["g1"] += 2 * guides["g0"]
            leaves |= guides
        options = options | {"gather_across_devices": True}
        found[name] = [evaluate(make(module, **options), leaves) for module in (interop, losses)]
    return found
