"""Augmentation changes what it says and nothing else."""

import torch

from sanitize.augment import AugmentConfig


def augmented(config: AugmentConfig, x_BCHW: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return config(x_BCHW, torch.Generator().manual_seed(seed))


def test_nothing_asked_for_changes_nothing() -> None:
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
