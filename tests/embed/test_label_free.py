import math

import pytest
import torch

from sanitize.data.tables import N_ORIENTATIONS
from sanitize.embed.label_free import oriented_gradients, reduced_pixels


def test_gradients_are_their_definition() -> None:
    """One pixel after the other, on a grid that divides the image."""
    images = torch.randint(0, 256, (2, 3, 12, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = oriented_gradients(images, 4).view(2, N_ORIENTATIONS, 4, 4)
    for i, image in enumerate(images.double().mean(1) / 255):
        cells = torch.zeros(N_ORIENTATIONS, 4, 4, dtype=torch.float64)
        for y in range(12):
            for x in range(8):
                dx = image[y, min(x + 1, 7)] - image[y, max(x - 1, 0)]
                dy = image[min(y + 1, 11), x] - image[max(y - 1, 0), x]
                place = float(torch.atan2(dy, dx)) % math.pi / math.pi * N_ORIENTATIONS
                low, share = int(place), place - int(place)
                for orientation, part in ((low, 1 - share), (low + 1, share)):
                    cells[orientation % N_ORIENTATIONS, y // 3, x // 2] += part * math.hypot(dx, dy) / 6
        wanted = cells / (cells.square().sum(0) + 1e-3).sqrt()
        torch.testing.assert_close(found[i].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [5, 28, 32, 100])
def test_any_image_gives_rows_of_the_same_length_and_a_flat_one_gives_zeros(side: int) -> None:
    images = torch.full((2, 1, side, side + 3), 9, dtype=torch.uint8)
    images[1, 0, ::2] = 200
    rows = oriented_gradients(images, 7)
    assert rows.shape == (2, N_ORIENTATIONS * 49)
    assert (rows[0] == 0).all()
    assert rows[1].isfinite().all()
    assert (rows[1] > 0).any()


def test_a_patch_stays_in_its_cells() -> None:
    images = torch.randint(0, 256, (1, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    patched = images.clone()
    patched[..., -3:, -3:] = 255
    same = (oriented_gradients(images, 7) == oriented_gradients(patched, 7)).view(N_ORIENTATIONS, 7, 7).all(0)
    assert same[:6, :6].all()
    assert not same[6, 6]


def test_pixels_are_means_of_blocks() -> None:
    images = torch.randint(0, 256, (2, 3, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wanted = images.float().unflatten(2, (14, 2)).unflatten(4, (14, 2)).mean((3, 5)).flatten(1) / 255
    torch.testing.assert_close(reduced_pixels(images, 14), wanted)
    assert torch.equal(reduced_pixels(images, 50), images.flatten(1).float() / 255)
