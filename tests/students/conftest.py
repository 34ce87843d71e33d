"""SAMs whose every tensor is one number, many times over: whole in names and shapes, and small on disk."""

import pytest
import torch
from segment_anything import sam_model_registry

from students import create_student, untrained_sam
from students.checkpoints import save_published


@pytest.fixture(scope="session")
def hollow_vit_b() -> dict[str, torch.Tensor]:
    """segment-anything's ViT-B; no two tensors hold the same number."""
    with torch.device("meta"):
        shapes = sam_model_registry["vit_b"]().state_dict()
    return {
        name: torch.tensor([0.5 - number / 1024]).expand(tensor.shape)
        for number, (name, tensor) in enumerate(shapes.items())
    }


@pytest.fixture(scope="session")
def small_sam(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The smallest RepViT in its publisher's layout, with a decoder; every weight drawn."""
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("small") / "repvit.pt"
    save_published(path, create_student("repvit_m0_9"), untrained_sam(torch.nn.Identity()))
    return torch.load(path, weights_only=True)
