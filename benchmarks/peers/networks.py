"""The workloads' networks in PyTorch, for all peers that train with it."""

import numpy as np
import torch
from exchange import Workload, distance
from torch import Tensor, nn


class Linear(nn.Module):
    """Logistic regression."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        self.dense1 = nn.Linear(shape[0] * shape[1] * shape[2], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.dense1(images.flatten(1))


class FemnistCNN(nn.Module):
    """conv 5×5 (32), pool, conv 5×5 (64), pool, dense 512, classes; zero padding keeps the size."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        height, width, channels = shape
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.pool = nn.MaxPool2d(2)
        self.dense1 = nn.Linear(64 * (height // 4) * (width // 4), 512)
        self.dense2 = nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.pool(self.conv1(images).relu())
        outputs = self.pool(self.conv2(outputs).relu())
        return self.dense2(self.dense1(outputs.flatten(1)).relu())


class SimpleCNN(nn.Module):
    """conv 3×3 (32), conv 3×3 (64), pool, dense 128, classes: pfl-research's, without its dropout."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        height, width, channels = shape
        self.conv1 = nn.Conv2d(channels, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.pool = nn.MaxPool2d(2)
        self.dense1 = nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
        self.dense2 = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.pool(self.conv2(self.conv1(images).relu()).relu())
        return self.dense2(self.dense1(outputs.flatten(1)).relu())


class LeNet(nn.Module):
    """conv 5×5 (6), pool, conv 5×5 (16), pool, dense 120, dense 84, classes."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        height, width, channels = shape
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.dense1 = nn.Linear(16 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2), 120)
        self.dense2 = nn.Linear(120, 84)
        self.dense3 = nn.Linear(84, classes)

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.pool(self.conv1(images).relu())
        outputs = self.pool(self.conv2(outputs).relu())
        outputs = self.dense2(self.dense1(outputs.flatten(1)).relu()).relu()
        return self.dense3(outputs)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, which is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.projected = stride > 1 or inputs != outputs
        if self.projected:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(outputs)

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.norm2(self.conv2(self.norm1(self.conv1(images)).relu()))
        return (outputs + (self.shortcut_norm(self.shortcut(images)) if self.projected else images)).relu()


class ResNet18(nn.Module):
    """ResNet-18 with a 3×3 stem and no max-pooling."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        self.conv = nn.Conv2d(shape[2], 64, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        before = 64
        for stage, channels in enumerate((64, 128, 256, 512), start=1):
            for number in (1, 2):
                stride = 2 if stage > 1 and number == 1 else 1
                setattr(self, f"stage{stage}_block{number}", ResidualBlock(before, channels, stride))
                before = channels
        self.dense = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.norm(self.conv(images)).relu()
        for stage in (1, 2, 3, 4):
            for number in (1, 2):
                outputs = getattr(self, f"stage{stage}_block{number}")(outputs)
        return self.dense(outputs.mean((2, 3)))


NETWORKS = {"mlp": Linear, "femnist_cnn": FemnistCNN, "simple_cnn": SimpleCNN, "lenet": LeNet, "resnet18": ResNet18}


def first_network(workload: Workload) -> nn.Module:
    """The workload's network with its first weights."""
    settings = workload.settings
    network = NETWORKS[settings["model"]](tuple(workload.images.shape[1:]), settings["classes"])
    weights = {name: torch.from_numpy(value.copy()) for name, value in workload.initial.items()}
    missing, unexpected = network.load_state_dict(weights, strict=False)
    counters = [name for name in missing if not name.endswith("num_batches_tracked")]
    assert not counters and not unexpected, (counters, unexpected)
    return network.train()


def normalised(images: np.ndarray) -> Tensor:
    """All images as the network takes them: float32 [N, C, H, W], mean and deviation 0.5."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float()
    return tensor.div_(127.5).sub_(1)


def moved(network: nn.Module, workload: Workload) -> float:
    """How far the trainable weights are from the first ones."""
    now = {name: value.detach().numpy() for name, value in network.named_parameters()}
    return distance(now, workload.initial)
