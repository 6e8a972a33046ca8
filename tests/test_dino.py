"""DINO: parity with an independent plain version, the head, views, schedules, masks, pictures, options."""

import copy

import plain_dino
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sslfast.train import attention, augment, data, distillation, loop, methods, optim
from sslfast.train.heads import DINOHead, Network
from sslfast.train.methods import Now
from sslfast.train.monitor import CollapseMonitor
from sslfast.train.vit import ViT, set_drop_path

CPU = torch.device("cpu")


def config(out, **changes):
    values = dict(
        out=out, data="mnist5k", epochs=2, batch_size=8, warmup_epochs=0.5, device="cpu", augment="mnist",
        prototypes=48, hidden_dim=24, bottleneck_dim=12, precision="float32",
    )  # fmt: skip
    return methods.module("dino").Config(**{**values, **changes})


def build(tmp_path, size=12, **changes):
    cfg = config(tmp_path, **changes)
    return loop.build("dino", cfg, 1, size), cfg


def crops(batch=8, local=2, size=12, small=8, dtype=torch.float32):
    sides = [size] * 2 + [small] * local
    return tuple(torch.rand(batch, 1, side, side, dtype=dtype) for side in sides)


# Five updates against tests/plain_dino.py


def plain_step(weights, views, images, centering, center, temperature):
    """Loss of the plain version, and its teacher's logits; weights: of (student, teacher), by name."""
    outputs = []
    for of, some in zip(weights, (views, views[:2]), strict=True):
        head = {name.removeprefix("head.mlp."): p for name, p in of.items() if name.startswith("head.mlp.")}
        head["prototypes"] = of["head.prototypes"]
        encoded = [x.flatten(1)[:, :20] @ of["encoder.weight"].T + of["encoder.bias"] for x in some]
        outputs.append([plain_dino.head(x, head) for x in encoded])
    if centering == "sinkhorn":
        return plain_dino.sinkhorn_dino_loss(*outputs, 0.1, temperature), outputs[1]
    return plain_dino.dino_loss(*outputs, center, 0.1, temperature), outputs[1]


class Tiny(nn.Module):
    """A linear encoder of the first 20 pixels."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(20, 10)
        self.weight, self.bias = self.linear.weight, self.linear.bias
        del self.linear

    def forward(self, x):
        return F.linear(x.flatten(1)[:, :20], self.weight, self.bias)


@pytest.mark.parametrize("centering", ["center", "sinkhorn"])
def test_five_steps_match_the_plain_version(centering, tmp_path):
    torch.manual_seed(0)
    steps, total, lr, temps = 5, 7, 1e-2, (0.04, 0.07)
    cfg = config(
        tmp_path, prototypes=30, centering=centering, momentum=0.9, teacher_temp=temps[1],
        teacher_temp_epochs=3, freeze_epochs=1, weight_decay=0.04, final_weight_decay=0.4, clip_norm=0.05,
    )  # fmt: skip
    network = Network(Tiny(), DINOHead(10, 30, 24, 12)).double()
    from sslfast.train.methods.dino import DINO

    model = DINO(network, cfg).double()
    groups = model.parameter_groups(cfg.weight_decay)
    update = torch.optim.AdamW(groups, lr=lr)
    student = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    teacher = {name: p.detach().clone() for name, p in network.named_parameters()}
    center, state = torch.zeros(30).double(), [{} for _ in student]
    images = torch.rand(steps, 6, 5, 1, 5, 5, dtype=torch.float64)  # 2 global views and 4 others of 5 images
    for k in range(steps):
        views, epoch = tuple(images[k]), k // 2
        model.train()
        model.schedule(Now(k, total, 2), update.param_groups)
        loss, _ = model.training_step(views)
        loss.backward()
        model.clip(cfg.clip_norm)
        update.step()
        update.zero_grad()
        model.after_step()

        temperature = plain_dino.teacher_temp(epoch, *temps, 3)
        expected, logits = plain_step((student, teacher), views, None, centering, center, temperature)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        names = [name for name in student if epoch or name != "head.prototypes"]
        found = dict(zip(names, torch.autograd.grad(expected, [student[n] for n in names]), strict=True))
        gradients = plain_dino.clip_each([found.get(name) for name in student], cfg.clip_norm)
        decay = plain_dino.cosine(0.04, 0.4, k, total)
        decays = [decay if p.dim() > 1 else 0.0 for p in student.values()]
        with torch.no_grad():
            plain_dino.adamw_step(list(student.values()), gradients, state, lr, decays)
            plain_dino.ema(list(teacher.values()), [p.detach() for p in student.values()],
                           plain_dino.cosine(0.9, 1.0, k, total))  # fmt: skip
        center = plain_dino.new_center(center, logits, 0.9)
        for name, p in network.named_parameters():
            torch.testing.assert_close(p, student[name], rtol=1e-10, atol=1e-10)
        for name, p in model.teacher.model.named_parameters():
            torch.testing.assert_close(p, teacher[name], rtol=1e-10, atol=1e-10)
        if centering == "center":
            torch.testing.assert_close(model.losses.images.center, center, rtol=1e-10, atol=1e-12)


def test_ibot_and_koleo_match_the_plain_version(tmp_path, monkeypatch):
    model, cfg = build(
        tmp_path, backbone="vit_nano", patch_size=4, ibot_weight=0.7, koleo_weight=0.3, centering="sinkhorn",
        ibot_head="separate",
    )  # fmt: skip
    model, views = model.double(), crops(4, dtype=torch.float64)
    model.teacher_temp.fill_(cfg.teacher_temp)
    drawn = []
    masks = distillation.draw_masks
    monkeypatch.setattr(distillation, "draw_masks", lambda *a: drawn.append(masks(*a)) or drawn[0])
    loss, metrics = model.training_step(views)

    mask, places, _ = drawn[0]
    networks, both = (model.student, model.teacher.model), torch.cat(views[:2])
    hidden = mask, model.student.mask_token
    tokens = networks[0].encoder.tokens(both, hidden=hidden), networks[1].encoder.tokens(both)
    classes = [*tokens[0][:, 0].chunk(2), *(model.student.encoder(x) for x in views[2:])]

    def logits(net, head, x):
        layers = getattr(net, head)
        return plain_dino.head(x, {**dict(layers.mlp.named_parameters()), "prototypes": layers.prototypes})

    student = [logits(networks[0], "head", x) for x in classes]
    teacher = [logits(networks[1], "head", x) for x in tokens[1][:, 0].chunk(2)]
    expected = plain_dino.sinkhorn_dino_loss(student, teacher, 0.1, cfg.teacher_temp)
    images = mask.nonzero()[:, 0]
    assert torch.equal(places, mask.flatten().nonzero()[:, 0])
    seen = logits(networks[0], "patch_head", tokens[0][:, 1:].flatten(0, 1)[places])
    hidden = logits(networks[1], "patch_head", tokens[1][:, 1:].flatten(0, 1)[places])
    ibot = plain_dino.ibot(seen, plain_dino.sinkhorn(hidden, cfg.teacher_temp, 3), images, 8, 0.1)
    koleo = sum(plain_dino.koleo(x) for x in classes[:2])
    torch.testing.assert_close(metrics["ibot_loss"], ibot, rtol=1e-9, atol=0)
    torch.testing.assert_close(metrics["koleo_loss"], koleo, rtol=1e-9, atol=0)
    expected = expected + 0.7 * ibot + 0.3 * koleo
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    trained = [p for p in model.student.parameters() if p.requires_grad]
    found, true = (torch.autograd.grad(x, trained, retain_graph=True) for x in (loss, expected))
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


# Head


def test_head_is_the_papers():
    head = DINOHead(20, 50)
    sizes = [tuple(x.weight.shape) if isinstance(x, nn.Linear) else type(x).__name__ for x in head.mlp]
    assert sizes == [(2048, 20), "GELU", (2048, 2048), "GELU", (256, 2048)]
    assert all((x.bias == 0).all() and abs(x.weight.std() - 0.02) < 0.002 for x in head.mlp[::2])
    torch.testing.assert_close(head(torch.randn(5, 20)).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(head.weight().norm(dim=1), torch.ones(50))
    assert len(list(head.parameters())) == 7
    assert len(list(DINOHead(20, 50, fixed_norm=False).parameters())) == 8


def test_head_is_weight_norm_and_copies(tmp_path):
    head = DINOHead(8, 30, 16, 6, fixed_norm=False)
    last = nn.utils.parametrizations.weight_norm(nn.Linear(6, 30, bias=False))
    last.parametrizations.weight.original1.data.copy_(head.prototypes.data)
    last.parametrizations.weight.original0.data.copy_(head.norms.data)
    x = torch.randn(4, 8)
    expected = last(head(x))
    torch.testing.assert_close(head(x) @ head.weight().T, expected)
    twin = copy.deepcopy(head)
    assert torch.equal(twin(x) @ twin.weight().T, head(x) @ head.weight().T)
    fast = torch.compile(lambda y: head(y) @ head.weight().T, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(x), expected)
    torch.compiler.reset()


# Views and networks


@pytest.mark.parametrize("preset", ["dino", "simclr", "mae", "mnist"])
@pytest.mark.parametrize("channels, size", [(3, 48), (1, 28)])
def test_multi_crop(preset, channels, size):
    images = torch.randint(0, 256, (50, channels, size, size), dtype=torch.uint8)
    views = augment.multi_crop(preset, size, channels, 3, 12, 0.4)
    torch.manual_seed(3)
    first = views(images)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, views(images), strict=True))
    assert [x.shape[-1] for x in first] == [size, size, 12, 12, 12]
    assert all(x.min() >= 0 and x.max() <= 1 and len(x) == 50 for x in first)
    assert not torch.equal(first[2], first[3])
    assert len(augment.multi_crop(preset, size, channels, 0, 12, 0.4)(images)) == 2


def test_views_of_one_size_go_through_the_encoder_together():
    seen = []

    class Encoder(nn.Module):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return x.flatten(1)[:, :4]

    views = (*torch.rand(2, 3, 1, 6, 6), *torch.rand(4, 3, 1, 4, 4), *torch.rand(1, 3, 1, 2, 2))
    features, _ = Network(Encoder(), DINOHead(4, 5, 6, 3))(views)
    assert seen == [(6, 1, 6, 6), (12, 1, 4, 4), (3, 1, 2, 2)] and features.shape == (7, 3, 4)
    for found, view in zip(features, views, strict=True):
        assert torch.equal(found, view.flatten(1)[:, :4])


def test_a_vit_takes_small_crops_with_interpolated_positions(tmp_path):
    model, cfg = build(tmp_path, backbone="vit_nano", patch_size=4, local_crops=2)
    views = model.views(cfg, 1, 12)(torch.randint(0, 256, (8, 1, 12, 12), dtype=torch.uint8))
    assert [x.shape[-1] for x in views] == [12, 12, 4, 4]
    loss, metrics = model.training_step(views)
    assert loss.isfinite() and metrics["embeddings"].shape == (8, 12)


def test_drop_path_is_the_students_alone(tmp_path):
    model, _ = build(tmp_path, backbone="vit_nano", patch_size=4, drop_path=0.3)
    rates = [block.drop_path for block in model.student.encoder.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert all(block.drop_path == 0 for block in model.teacher.model.encoder.blocks)
    set_drop_path(model.student.encoder, 0)
    assert all(block.drop_path == 0 for block in model.student.encoder.blocks)


def test_what_is_evaluated_is_the_teacher(tmp_path):
    model, _ = build(tmp_path)
    assert model.encoder is model.teacher.model.encoder and model.encoder is not model.student.encoder


# Schedules


def test_schedules(tmp_path):
    model, cfg = build(tmp_path, teacher_temp=0.07, teacher_temp_epochs=4, freeze_epochs=1.5, momentum=0.9)
    groups = model.parameter_groups(cfg.weight_decay)
    seen = []
    for step in range(60):
        model.schedule(Now(step, 60, 10), groups)
        seen.append((model.teacher_temp.item(), model.momentum.item(), groups[0]["weight_decay"],
                     model.student.head.prototypes.requires_grad))  # fmt: skip
    assert [x[0] for x in seen[::10]] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert seen[0][1:3] == pytest.approx((0.9, 0.04)) and seen[30][1:3] == pytest.approx((0.95, 0.22))
    assert [x[3] for x in seen] == [False] * 15 + [True] * 45
    assert groups[1]["weight_decay"] == 0


def test_clip_each():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0, 4]), torch.tensor([0.3, 0.4])
    assert optim.clip_each(parameters, 1.0).item() == pytest.approx(25.25**0.5)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0, 0.8]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.3, 0.4]))


# Masks, monitor, pictures, options


def test_masks_have_one_total_and_weights_by_image():
    for images, grid in ((32, (14, 14)), (2, (3, 3)), (7, (4, 6)), (1, (2, 2))):
        totals = set()
        for _ in range(4):
            mask, places, weights = distillation.draw_masks(images, grid, CPU)
            assert torch.equal(places, mask.flatten().nonzero()[:, 0])
            count = mask.sum(1)
            assert (count > 0).sum() == max(1, images // 2)
            of_rows = torch.zeros(images).double().index_add_(0, places // mask.shape[1], weights)
            torch.testing.assert_close(of_rows, (count > 0).double())
            totals.add(len(places))
        assert len(totals) == 1
    assert 0.1 * 196 <= count.sum() or grid == (2, 2)


def test_frozen_prototypes_keep_their_norms_too(tmp_path):
    model, _ = build(tmp_path, fixed_norm=False, freeze_epochs=1)
    head = model.student.head
    for step in (0, 10):
        model.schedule(Now(step, 60, 10), [])
        assert head.prototypes.requires_grad == head.norms.requires_grad == (step == 10)


def test_the_teachers_collapse_is_said():
    monitor = CollapseMonitor()
    for entropy, kl, said in (
        (0.995, 0.001, True),
        (0.001, 0.001, True),
        (0.9, 0.001, False),
        (1, 0.5, False),
    ):
        assert bool(monitor.warning({"teacher_entropy": entropy, "kl": kl})) == said


def test_rising_is_the_official_table():
    for epochs in (0, 1, 2, 5):
        for epoch in range(7):
            expected = plain_dino.teacher_temp(epoch, 0.04, 0.07, epochs)
            if epochs != 1 or epoch == 0:
                assert distillation.rising(0.04, 0.07, epoch, epochs) == pytest.approx(expected)


def test_entropy_tells_uniform_from_collapsed():
    prototypes = F.normalize(torch.randn(64, 8), dim=1)
    rows = prototypes[:10].contiguous()
    uniform = distillation._entropy(rows * 1e-4, prototypes, torch.zeros(64))
    sure = distillation._entropy(rows * 1e4, prototypes, torch.zeros(64))
    assert uniform.item() == pytest.approx(torch.tensor(64.0).log().item(), abs=1e-3) and sure < 1e-3


def test_pictures(tmp_path):
    images = data.ImageSet(torch.randint(0, 256, (12, 3, 16, 16)).byte(), None)
    encoder = ViT(3, 16, 4, 32, 2, 4).eval()
    assert attention.show(encoder, images, tmp_path, CPU) == {}
    assert {x.name for x in tmp_path.iterdir()} == {"attention.png", "components.png"}
    assert attention.show(nn.Identity(), images, tmp_path / "none", CPU) == {}


def test_components_are_the_largest():
    x = torch.randn(100, 6) * torch.tensor([9.0, 5, 3, 0.1, 0.1, 0.1])
    found = attention.components(x)
    assert found.shape == (100, 3) and found.min() == 0 and found.max() == 1
    for i in range(3):
        assert torch.corrcoef(torch.stack((found[:, i], x[:, i])))[0, 1].abs() > 0.95
    assert (attention.components(torch.randn(5, 2))[:, 2] == 0).all()


@pytest.mark.parametrize(
    "name, value",
    [
        ("student_temp", 0.0), ("teacher_temp", -1.0), ("momentum", 1.5), 
        ("prototypes", 1), ("local_crops", -1), ("ibot_weight", -1.0), ("centering", "mean"),
        ("drop_path", 2.0),
    ],
)  # fmt: skip
def test_options_are_checked(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}: "):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize("change", [{"crop_area": 0.05}, {"crop_area": 1.5}, {"local_size": 6}])
def test_views_are_checked(change, tmp_path):
    model, cfg = build(tmp_path, backbone="vit_nano", patch_size=4, **change)
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: "):
        model.views(cfg, 1, 12)


def test_ibot_wants_a_vit(tmp_path):
    with pytest.raises(ValueError, match="^ibot_weight: iBOT masks the patches of a ViT"):
        build(tmp_path, ibot_weight=1.0)
