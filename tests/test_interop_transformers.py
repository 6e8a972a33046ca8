"""transformers' ViTMAE masking beside the installed original: to the bit, with the same random numbers."""

import copy
import pickle

import plain_interop
import pytest
import torch
from originals import assert_signature, original

vit_mae = original("transformers.models.vit_mae.modeling_vit_mae")

from sslfast import interop  # noqa: E402
from sslfast.interop.transformers import ViTMAEEmbeddings, random_masking  # noqa: E402

ORIGINAL = vit_mae.ViTMAEEmbeddings.random_masking
RATIOS = pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 0.9, 1.0])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)


def config(ratio=0.75, **changes):
    from transformers import ViTMAEConfig

    return ViTMAEConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16,
        patch_size=4, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16, mask_ratio=ratio, **changes,
    )  # fmt: skip


class Holder:
    """All of `self` that the method may ask for."""

    def __init__(self, ratio):
        self.config = config(ratio)


def equal(mine, its):
    assert type(mine) is type(its) and len(mine) == len(its) == 3
    for x, y in zip(mine, its, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)


def test_signatures():
    assert_signature(random_masking, ORIGINAL)
    assert_signature(ViTMAEEmbeddings.random_masking, ORIGINAL)
    assert_signature(ViTMAEEmbeddings.__init__, vit_mae.ViTMAEEmbeddings.__init__)
    assert_signature(ViTMAEEmbeddings.forward, vit_mae.ViTMAEEmbeddings.forward)
    assert issubclass(ViTMAEEmbeddings, vit_mae.ViTMAEEmbeddings)
    assert ViTMAEEmbeddings is not vit_mae.ViTMAEEmbeddings and ORIGINAL is not random_masking


@RATIOS
@DTYPES
@pytest.mark.parametrize("shape", [(3, 16, 8), (1, 10, 5), (2, 1, 4), (5, 196, 3)], ids=str)
def test_same_noise(ratio, dtype, shape):
    holder, x, noise = Holder(ratio), torch.randn(shape).to(dtype), torch.rand(shape[:2])
    mine = random_masking(holder, x, noise)
    equal(mine, ORIGINAL(holder, x, noise))
    equal(mine, plain_interop.masking(x, noise, ratio))


@RATIOS
def test_same_seed(ratio):
    holder, x = Holder(ratio), torch.randn(4, 25, 6)
    results = []
    for method in (random_masking, ORIGINAL):
        torch.manual_seed(11)
        results.append((method(holder, x), torch.get_rng_state()))
    equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


NOISES = {
    "all equal": lambda: torch.zeros(3, 16),
    "ties": lambda: torch.randint(3, (3, 16)).float(),
    "0 and -0": lambda: torch.tensor([0.0, -0.0, 1.0, -1.0]).repeat(3, 4),
    "infinite": lambda: torch.tensor([torch.inf, 0.0, -torch.inf, 1.0]).repeat(3, 4),
    "nan": lambda: torch.tensor([torch.nan, 0.0, 2.0, -1.0]).repeat(3, 4),
    "float64": lambda: torch.rand(3, 16, dtype=torch.float64),
    "near": lambda: 1 + 1e-12 * torch.rand(3, 16, dtype=torch.float64),
    "float16": lambda: torch.rand(3, 16).half(),
    "bfloat16": lambda: torch.rand(3, 16).bfloat16(),
    "integers": lambda: torch.randint(9, (3, 16)),
    "negative": lambda: torch.randn(3, 16),
    "strided": lambda: torch.rand(16, 3).T,
    "one row for all": lambda: torch.rand(1, 16).expand(3, 16),
    "subnormal": lambda: 1e-42 * torch.rand(3, 16),
}


@pytest.mark.parametrize("draw", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_noises(draw, ratio):
    holder, x, noise = Holder(ratio), torch.randn(3, 16, 8), draw()
    equal(random_masking(holder, x, noise), ORIGINAL(holder, x, noise))


@RATIOS
def test_sequences(ratio):
    """Strided, without images, and of more rows than a kernel takes at once."""
    holder = Holder(ratio)
    for x in (torch.randn(8, 3, 16).permute(1, 2, 0), torch.randn(0, 16, 8), torch.randn(3, 17, 8)[:, 1:],
              torch.randn(1, 16, 8).expand(3, 16, 8), torch.randn(600, 16, 8)):  # fmt: skip
        noise = torch.rand(x.shape[:2])
        equal(random_masking(holder, x, noise), ORIGINAL(holder, x, noise))


@RATIOS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients(ratio, dtype):
    holder, noise, found = Holder(ratio), torch.rand(3, 16), []
    x = torch.randn(3, 16, 8).to(dtype)
    upstream = torch.randn(3, int(16 * (1 - ratio)), 8).to(dtype)
    for method in (random_masking, ORIGINAL):
        leaf = x.clone().requires_grad_()
        kept, mask, ids = method(holder, leaf, noise)
        assert not mask.requires_grad and not ids.requires_grad
        found.append(torch.autograd.grad(kept, leaf, upstream)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("train", [True, False])
def test_embeddings(train):
    torch.manual_seed(0)
    its = vit_mae.ViTMAEEmbeddings(config())
    mine = ViTMAEEmbeddings(config())
    assert list(mine.state_dict()) == list(its.state_dict())
    mine.load_state_dict(its.state_dict())
    pixels, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    mine.train(train), its.train(train)
    equal(mine(pixels, noise), its(pixels, noise))
    equal(mine(pixels, noise=noise), its(pixels, noise=noise))
    torch.manual_seed(4)
    first = mine(pixels)
    torch.manual_seed(4)
    equal(first, its(pixels))
    large = torch.randn(2, 3, 24, 24)
    torch.manual_seed(4)
    first = mine(large, interpolate_pos_encoding=True)
    torch.manual_seed(4)
    equal(first, its(large, interpolate_pos_encoding=True))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(twin):
    mine, x = ViTMAEEmbeddings(config()), torch.randn(2, 3, 16, 16)
    other = twin(mine)
    noise = torch.rand(2, 16)
    equal(other(x, noise), mine(x, noise))


def trained(model, seed):
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    torch.manual_seed(seed)
    out = model(pixels)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out, gradients


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("how", ["method", "module"])
def test_pretraining(ratio, how, monkeypatch):
    """A whole step with the method in the original's class, and with our class in the model."""
    torch.manual_seed(0)
    model = vit_mae.ViTMAEForPreTraining(config(ratio)).double()
    its, expected = trained(model, 5)
    if how == "method":
        monkeypatch.setattr(vit_mae.ViTMAEEmbeddings, "random_masking", random_masking)
    else:
        embeddings = ViTMAEEmbeddings(model.config).double()
        embeddings.load_state_dict(model.vit.embeddings.state_dict())
        model.vit.embeddings = embeddings
    mine, found = trained(model, 5)
    assert torch.equal(mine.mask, its.mask) and torch.equal(mine.ids_restore, its.ids_restore)
    assert torch.equal(mine.logits, its.logits)
    assert torch.equal(mine.loss, its.loss) or (mine.loss.isnan() and its.loss.isnan())  # nothing is masked
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_users_subclass():
    class Mine(ViTMAEEmbeddings):
        def random_masking(self, sequence, noise=None):
            kept, mask, ids = super().random_masking(sequence, noise)
            return 2 * kept, mask, ids

    torch.manual_seed(0)
    embeddings, x, noise = Mine(config()), torch.randn(2, 16, 8), torch.rand(2, 16)
    expected = ORIGINAL(embeddings, x, noise)
    equal(embeddings.random_masking(x, noise), (2 * expected[0], *expected[1:]))


@pytest.mark.parametrize(
    "sequence, noise", [((3, 16), (3, 16)), ((3, 16, 8), (4, 16)), ((3, 16, 8), (3, 17))], ids=str
)
def test_wrong_shapes(sequence, noise):
    for method in (ORIGINAL, random_masking):
        with pytest.raises((RuntimeError, ValueError)):
            method(Holder(0.0), torch.randn(sequence), torch.rand(noise))


def test_patch(request):
    """Models that exist get it as well, and those of a subclass that has one of its own do not."""
    kind = vit_mae.ViTMAEEmbeddings
    model = kind(config())

    class Mine(kind):
        def random_masking(self, sequence, noise=None):
            return "mine"

    class Plain(kind):
        pass

    x, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    expected = model(x, noise)
    swapped = interop.patch("transformers")
    request.addfinalizer(lambda: interop.unpatch("transformers"))
    assert [n.rsplit(".", 1)[1] for n in swapped] == ["random_masking"]
    assert vit_mae.ViTMAEEmbeddings is kind and kind.random_masking is not ORIGINAL
    assert Plain.random_masking is kind.random_masking and Mine(config()).random_masking(None) == "mine"
    for a, b in zip(model(x, noise), expected, strict=True):
        assert torch.equal(a, b)
    assert type(pickle.loads(pickle.dumps(model))) is kind and b"sslfast" not in pickle.dumps(model)
    assert interop.patch("transformers") == swapped
    interop.unpatch("transformers")
    assert kind.random_masking is ORIGINAL and Plain.random_masking is ORIGINAL
