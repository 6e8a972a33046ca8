"""open_clip's training step, with one line changed: a small CLIP on scikit-learn's digits and captions.

pip install open_clip_torch scikit-learn tyro
python examples/open_clip_train.py --epochs 10
"""

import math

import open_clip
import torch
import tyro
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sslfast.interop.open_clip import ClipLoss  # was: from open_clip import ClipLoss

WORDS = "zero one two three four five six seven eight nine".split()
TEMPLATES = (
    "a photo of the digit {}",
    "a handwritten {}",
    "the number {}",
    "{} on paper",
    "someone wrote {}",
)


def data() -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] and digits [N]."""
    images, digits = load_digits(return_X_y=True)
    x = torch.from_numpy(images.reshape(-1, 1, 8, 8)).float() / 8 - 1
    return nn.functional.interpolate(x, 32, mode="bilinear").expand(-1, 3, -1, -1), torch.from_numpy(digits)


@torch.no_grad()
def zero_shot(model: CLIP, tokenizer, images: Tensor, digits: Tensor) -> float:
    """Accuracy of the nearest class, each the mean of its captions."""
    model.eval()
    texts = tokenizer([template.format(word) for word in WORDS for template in TEMPLATES])
    classes = model.encode_text(texts).view(len(WORDS), len(TEMPLATES), -1).mean(1)
    found = (model.encode_image(images) @ classes.T).argmax(1)
    model.train()
    return float((found == digits).float().mean())


def main(epochs: int = 20, batch_size: int = 128, learning_rate: float = 3e-4, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model = CLIP(
        embed_dim=128,
        vision_cfg=CLIPVisionCfg(layers=4, width=128, head_width=32, patch_size=8, image_size=32),
        text_cfg=CLIPTextCfg(context_length=16, width=128, heads=4, layers=2),
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    images, digits = data()
    held_out = torch.arange(len(images)) % 5 == 0
    test = images[held_out], digits[held_out]
    train = images[~held_out], digits[~held_out]
    criterion = ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.1)
    before = zero_shot(model, tokenizer, *test)
    for epoch in range(epochs):
        order = torch.randperm(len(train[0]))
        for chosen in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
            captions = [
                TEMPLATES[int(torch.randint(len(TEMPLATES), ()))].format(WORDS[i]) for i in train[1][chosen]
            ]
            image_features, text_features, logit_scale = model(train[0][chosen], tokenizer(captions))
            loss = criterion(image_features, text_features, logit_scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    print(f"zero-shot: {zero_shot(model, tokenizer, *test):.3f}, untrained {before:.3f}")


if __name__ == "__main__":
    tyro.cli(main)
