"""lightly's SimCLR in Lightning, with one line changed, on the handwritten digits of scikit-learn.

pip install lightly scikit-learn tyro
python examples/lightly_simclr.py --epochs 10
"""

import pytorch_lightning as pl
import torch
import torchvision
import tyro
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sslfast.interop.lightly import NTXentLoss  # was: from lightly.loss import NTXentLoss


class SimCLR(pl.LightningModule):
    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        resnet.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)  # the stem for small images
        resnet.maxpool = nn.Identity()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1], nn.Flatten())
        self.projection_head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = NTXentLoss(temperature=0.2)
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))

    def training_step(self, batch: tuple, batch_index: int) -> Tensor:
        (x0, x1), _ = batch
        loss = self.criterion(self(x0), self(x1))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.learning_rate)


class Digits(torch.utils.data.Dataset):
    """8 x 8 gray images in `size` x `size` RGB, and their digits."""

    def __init__(self, transform, size: int = 16) -> None:
        images, self.labels = load_digits(return_X_y=True)
        pixels = (images.reshape(-1, 8, 8) * (255 / 16)).astype("uint8")
        self.images = [Image.fromarray(x).resize((size, size)).convert("RGB") for x in pixels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        return self.transform(self.images[i]), int(self.labels[i])


@torch.no_grad()
def neighbour_accuracy(backbone: nn.Module) -> float:
    """Share of the images whose nearest other image, by cosine of features, shows the same digit."""
    digits = Digits(torchvision.transforms.ToTensor())
    images, labels = map(torch.stack, zip(*((x, torch.tensor(y)) for x, y in digits), strict=True))
    backbone.eval()
    z = nn.functional.normalize(torch.cat([backbone(x) for x in images.split(256)]), dim=1)
    nearest = (z @ z.T).fill_diagonal_(-1).argmax(1)
    return float((labels[nearest] == labels).float().mean())


def main(epochs: int = 10, batch_size: int = 256, seed: int = 0) -> None:
    pl.seed_everything(seed)
    transform = SimCLRTransform(
        input_size=16, min_scale=0.5, hf_prob=0.0, gaussian_blur=0.0, random_gray_scale=0.0
    )
    loader = torch.utils.data.DataLoader(
        Digits(transform), batch_size, shuffle=True, drop_last=True, num_workers=2
    )
    model = SimCLR()
    before = neighbour_accuracy(model.backbone)
    model.train()
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(model, loader)
    print(f"nearest neighbour: {neighbour_accuracy(model.backbone):.3f}, untrained {before:.3f}")


if __name__ == "__main__":
    tyro.cli(main)
