"""Augmentation changes what it says and nothing else."""

import torch

from sanitize.augment import AugmentConfig


def augmented(config: AugmentConfig, x_BCHW: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return config(x_BCHW, torch.Generator().manual_seed(seed))


def test_the_defaults_change_nothing() -> None:
    x_BCHW = torch.randn(5, 3, 4, 4)
    assert torch.equal(augmented(AugmentConfig(brightness=0, contrast=0), x_BCHW), x_BCHW)


def test_brightness_and_contrast_stay_within_their_share_and_move_no_pixel() -> None:
    x_BCHW = torch.randn(400, 1, 4, 4)
    out_BCHW = augmented(AugmentConfig(brightness=0.1, contrast=0.2), x_BCHW)
    for x, y in zip(x_BCHW.flatten(1).double(), out_BCHW.flatten(1).double(), strict=True):
        gain = ((y - y.mean()) @ (x - x.mean())) / (x - x.mean()).square().sum()
        shift = y.mean() - gain * x.mean()
        assert 0.8 - 1e-4 <= gain <= 1.2 + 1e-4
        assert abs(shift) <= 0.1 + 1e-4
        torch.testing.assert_close(y, gain * x + shift, rtol=1e-4, atol=1e-4)


def test_flip_mirrors_about_half_of_the_images() -> None:
    x_BCHW = torch.randn(400, 1, 3, 3)
    out_BCHW = augmented(AugmentConfig(brightness=0, contrast=0, flip=True), x_BCHW)
    mirrored_B = (out_BCHW == x_BCHW.flip(3)).flatten(1).all(1)
    same_B = (out_BCHW == x_BCHW).flatten(1).all(1)
    assert (mirrored_B ^ same_B).all()
    assert 150 < mirrored_B.sum() < 250


def test_a_shift_moves_whole_images_and_fills_with_their_black() -> None:
    x_BCHW = torch.rand(300, 2, 5, 6) + 1
    out_BCHW = augmented(AugmentConfig(shift=2), x_BCHW)
    assert out_BCHW.shape == x_BCHW.shape
    moves = set()
    for x_CHW, out_CHW in zip(x_BCHW, out_BCHW, strict=True):
        black_C11 = x_CHW.amin((1, 2), keepdim=True)
        padded_CHW = torch.nn.functional.pad(x_CHW - black_C11, [2] * 4) + black_C11
        windows = {(i, j): padded_CHW[:, i : i + 5, j : j + 6] for i in range(5) for j in range(5)}
        (move,) = [at for at, window in windows.items() if torch.allclose(window, out_CHW)]
        moves.add(move)
    assert len(moves) == 25


def test_a_crop_is_a_part_of_the_image_enlarged() -> None:
    """Two ramps, in x and in y, stay ramps: their slopes say how large the part is, their ends where it was."""
    n, side = 300, 16
    at_W = (torch.arange(side) + 0.5) / side
    ramps_2HW = torch.stack(torch.meshgrid(at_W, at_W, indexing="xy"))
    out_B2HW = augmented(AugmentConfig(crop=0.25), ramps_2HW.expand(n, -1, -1, -1).contiguous())
    inner_B2HW = out_B2HW[:, :, 3:-3, 3:-3]  # at the border there is nothing to interpolate with
    width_B = side * (inner_B2HW[:, 0, :, 1:] - inner_B2HW[:, 0, :, :-1]).mean((1, 2))
    height_B = side * (inner_B2HW[:, 1, 1:] - inner_B2HW[:, 1, :-1]).mean((1, 2))
    torch.testing.assert_close(out_B2HW[:, 0, 3], out_B2HW[:, 0, 12])  # nothing is turned or sheared
    area_B, aspect_B = width_B * height_B, width_B / height_B
    assert 0.25 - 1e-3 < area_B.min() < 0.3
    assert 0.9 < area_B.max() < 1 + 1e-3
    assert 3 / 4 - 1e-3 < aspect_B.min() < 0.8
    assert 1.25 < aspect_B.max() < 4 / 3 + 1e-3
    assert out_B2HW.min() >= 0
    assert out_B2HW.max() <= 1
    centre_B = inner_B2HW[:, 0].mean((1, 2))
    assert centre_B.min() < 0.35
    assert centre_B.max() > 0.65


def test_colours_fade_and_greys_do_not() -> None:
    x_BCHW = torch.randn(200, 3, 4, 4)
    out_BCHW = augmented(AugmentConfig(saturation=0.5), x_BCHW)
    torch.testing.assert_close(out_BCHW.mean(1), x_BCHW.mean(1), rtol=0, atol=1e-5)
    gain_B = (out_BCHW - out_BCHW.mean(1, True)).flatten(1).norm(dim=1) / (x_BCHW - x_BCHW.mean(1, True)).flatten(
        1
    ).norm(dim=1)
    assert 0.5 - 1e-4 <= gain_B.min() < 0.6
    assert 1.4 < gain_B.max() <= 1.5 + 1e-4
    grey_B = augmented(AugmentConfig(grey=0.3), x_BCHW).std(1).flatten(1).amax(1) < 1e-5
    assert 35 < grey_B.sum() < 85
    one_BCHW = x_BCHW[:, :1]
    torch.testing.assert_close(augmented(AugmentConfig(saturation=0.5, grey=0.5), one_BCHW), one_BCHW)
