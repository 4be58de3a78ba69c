"""What must be true of every trigger, and the bound of each."""

import math

import pytest
import torch
from pydantic import ValidationError

from sanitize.attack import (
    ATTACKS,
    AdaptiveBlendConfig,
    Attack,
    BadNetsConfig,
    BlendedConfig,
    CleanLabelConfig,
    L0Config,
    L2Config,
    LabelNoiseConfig,
    SeveralConfig,
    SIGConfig,
    SmoothConfig,
    TaCTConfig,
    TrojanSquareConfig,
    TrojanWatermarkConfig,
    WaNetConfig,
)
from sanitize.compute import Compute
from sanitize.errors import ConfigError

TRIGGERS: list[Attack] = [kind(rate=0.1) for kind in ATTACKS.values() if kind.has_trigger]
every_trigger = pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: type(trigger).__name__)
every_shape = pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 5, 12), (1, 3, 3)], ids=str)


def noise(shape: tuple[int, ...], n: int = 6) -> torch.Tensor:
    return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@every_trigger
@every_shape
def test_a_trigger_changes_copies_of_images_of_any_shape_each_by_itself(
    trigger: Attack, shape: tuple[int, ...]
) -> None:
    images = noise(shape)
    before = images.clone()
    state = torch.get_rng_state()
    out = trigger.apply(images)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert out.dtype == torch.uint8
    assert out.shape == images.shape
    if trigger.kind != "sig" or 2 * trigger.frequency % shape[2]:  # 12 and 3 pixels are too few for 6 periods
        assert (out != images).flatten(1).any(1).all()
    assert torch.equal(out, torch.cat([trigger.apply(image[None]) for image in images]))
    assert torch.equal(out, trigger.model_copy().apply(images))


@pytest.mark.parametrize("kind", ATTACKS.values())
def test_every_attack_declares_who_is_eligible_and_is_built_as_it_declares(
    kind: type[Attack], compute: Compute
) -> None:
    attack, labels = kind(rate=0.1), torch.arange(10)
    wanted = attack.relabel(labels, 10, torch.Generator())
    can_be = torch.isin(labels, torch.tensor(getattr(attack, "sources", None) or range(10)))
    assert torch.equal(attack.eligible(labels, wanted), ((wanted == labels) == kind.keeps_label) & can_be)
    assert attack.eligible(labels, wanted).any()
    assert attack.attacks == (attack,)
    if kind.needs_surrogate:
        with pytest.raises(ConfigError, match=f"{attack.kind} needs a surrogate"):
            attack.build(None, compute)
    else:
        images = noise((3, 9, 9), 10)
        poisoned = attack.build(None, compute)(images, labels, list(range(10)))
        assert (poisoned != images).flatten(1).any(1).all() == kind.has_trigger


@pytest.mark.parametrize("keeps_label", [False, True])
def test_several_declare_what_one_of_them_declares(keeps_label: bool) -> None:
    noise = LabelNoiseConfig(rate=0.1)
    several = SeveralConfig(attacks=(noise, CleanLabelConfig(rate=0.1, target=7)) if keeps_label else (noise, noise))
    assert (several.has_trigger, several.needs_surrogate) == (keeps_label, keeps_label)
    several.check_classes(8)
    if keeps_label:
        with pytest.raises(ConfigError, match="target 7 is no class: there are 7, from 0 to 6"):
            several.check_classes(7)


@every_trigger
def test_the_labels_are_the_target_or_the_next_class(trigger: Attack) -> None:
    labels, generator = torch.arange(10), torch.Generator()
    assert torch.equal(trigger.relabel(labels, 10, generator), torch.zeros(10, dtype=torch.int64))
    if not trigger.keeps_label:
        to_next = trigger.model_copy(update={"target": "next"})
        assert torch.equal(to_next.relabel(labels, 10, generator), (labels + 1) % 10)


@pytest.mark.parametrize("kind", [kind for kind in ATTACKS.values() if "pattern_seed" in kind.model_fields])
def test_another_seed_is_another_pattern(kind: type) -> None:
    images = noise((3, 16, 16))
    one, other = (kind(rate=0.1, pattern_seed=seed).apply(images) for seed in (0, 1))
    assert (one != other).any()


@every_shape
@pytest.mark.parametrize("n_pixels", [1, 9, 10_000])
def test_l0_changes_no_more_pixels_than_it_may_and_always_the_same(shape: tuple[int, ...], n_pixels: int) -> None:
    images = noise(shape, 50)
    out = L0Config(rate=0.1, n_pixels=n_pixels).apply(images)
    differs_NHW = (out != images).any(1)
    assert differs_NHW.sum((1, 2)).max() <= n_pixels
    changed_HW = differs_NHW.any(0)
    assert changed_HW.sum() == min(n_pixels, shape[1] * shape[2])
    assert ((out == out[0]) | ~changed_HW).all()
    assert set(out[:, :, changed_HW].unique().tolist()) <= {0, 255}


@every_shape
@pytest.mark.parametrize("length", [1, 1.5, 20, 333.3, 100_000])
def test_l2_is_no_longer_than_it_may_be_and_nearly_as_long(shape: tuple[int, ...], length: float) -> None:
    trigger = L2Config(rate=0.1, length=length)
    moved = trigger.apply(noise(shape, 20)).double() - noise(shape, 20).double()
    assert moved.flatten(1).norm(dim=1).max() <= length
    middle = torch.full((1, *shape), 128, dtype=torch.uint8)
    if (pattern := trigger._pattern(torch.Size(shape))).abs().max() < 128:  # nothing is clipped
        assert torch.equal(trigger.apply(middle).long() - 128, pattern[None])
    assert length - pattern.double().norm() < max(1.0, 0.02 * length)


@every_shape
@pytest.mark.parametrize("amplitude", [1, 32, 255])
def test_smooth_moves_no_pixel_further_than_its_amplitude(shape: tuple[int, ...], amplitude: int) -> None:
    images = noise(shape, 20)
    moved = SmoothConfig(rate=0.1, amplitude=amplitude).apply(images).long() - images.long()
    assert moved.abs().max() <= amplitude
    if amplitude < 128:
        middle = torch.full((1, *shape), 128, dtype=torch.uint8)
        assert (SmoothConfig(rate=0.1, amplitude=amplitude).apply(middle).long() - 128).abs().max() == amplitude


def test_smooth_has_low_frequencies_alone() -> None:
    trigger = SmoothConfig(rate=0.1, amplitude=100, n_frequencies=4)
    pattern = trigger.apply(torch.full((1, 1, 32, 32), 128, dtype=torch.uint8)).double() - 128
    # The cosine transform is the real part of the Fourier transform of the image beside its mirror image.
    doubled = torch.cat([pattern, pattern.flip(2)], 2)
    doubled = torch.cat([doubled, doubled.flip(3)], 3)
    power = torch.fft.fft2(doubled)[0, 0, :32, :32].abs().square()
    assert power[:4, :4].sum() > 0.999 * power.sum()
    assert power[0, 0] < 1e-3 * power.sum()


def test_a_warp_moves_what_is_there_by_about_its_strength_and_brings_no_new_colour() -> None:
    ramp = (7 * torch.arange(32, dtype=torch.uint8)).expand(1, 1, 32, 32).contiguous()
    moved = (WaNetConfig(rate=0.1, strength=1.0).apply(ramp).double() - ramp.double())[0, 0] / 7
    inside = moved[4:-4, 4:-4]
    assert 0.2 < inside.abs().mean() < 1.5
    assert inside.abs().max() < 4
    stronger = (WaNetConfig(rate=0.1, strength=2.0).apply(ramp).double() - ramp.double())[0, 0] / 7
    torch.testing.assert_close(stronger[8:-8, 8:-8], 2 * moved[8:-8, 8:-8], atol=0.3, rtol=0)
    flat = torch.full((2, 3, 20, 9), 77, dtype=torch.uint8)
    assert torch.equal(WaNetConfig(rate=0.1, strength=3).apply(flat), flat)


def test_a_weak_warp_is_none() -> None:
    images = noise((3, 16, 16))
    assert torch.equal(WaNetConfig(rate=0.1, strength=1e-4).apply(images), images)


def test_the_square_covers_its_share_and_the_watermark_only_brightens() -> None:
    images = noise((3, 40, 40), 100)
    differs_HW = (TrojanSquareConfig(rate=0.1, side=0.2).apply(images) != images).any(1).any(0)
    assert differs_HW.sum() == 8 * 8
    assert differs_HW[31:39, 31:39].all()
    opacity = 0.4
    out = TrojanWatermarkConfig(rate=0.1, opacity=opacity).apply(images)
    assert (out >= images).all()
    differs_HW = (out != images).any(1).any(0)
    assert 0.1 < differs_HW.double().mean() < 0.6
    wanted = (images.double() + opacity * (255 - images.double()))[..., differs_HW]
    assert (out[..., differs_HW].double() - wanted).abs().max() <= 0.5 + 1e-4


def test_a_clean_label_attack_has_a_patch_in_each_corner() -> None:
    black = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    out = CleanLabelConfig(rate=0.1).apply(black)[0, 0]
    corners = [out[a, b] for a in (slice(1, 4), slice(24, 27)) for b in (slice(1, 4), slice(24, 27))]
    wanted = torch.tensor([[255, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    assert all(torch.equal(corner, wanted) for corner in corners)
    assert out.count_nonzero() == 4 * 5


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (CleanLabelConfig, {"target": "next"}),
        (CleanLabelConfig, {"epsilon": 256}),
        (SIGConfig, {"target": "next"}),
        (SIGConfig, {"delta": 256}),
        (SIGConfig, {"delta": math.nan}),
        (SIGConfig, {"frequency": 0}),
        (SIGConfig, {"frequency": math.inf}),
        (TaCTConfig, {"sources": []}),
        (TaCTConfig, {"sources": None}),
        (BadNetsConfig, {"sources": [-1]}),
        (BadNetsConfig, {"sources": [2**70]}),
        (BadNetsConfig, {"cover_rate": 1.1}),
        (BadNetsConfig, {"cover_rate": math.nan}),
        (BadNetsConfig, {"size": 1.0}),
        (BadNetsConfig, {"size": 0.001}),
        (BadNetsConfig, {"size": 10**9}),
        (BadNetsConfig, {"size": True}),
        (BlendedConfig, {"grain": 0}),
        (BlendedConfig, {"pattern_seed": 2**64}),
        (AdaptiveBlendConfig, {"pieces": 0}),
        (AdaptiveBlendConfig, {"kept": 0}),
        (AdaptiveBlendConfig, {"test_alpha": 1.5}),
        (TrojanSquareConfig, {"cells": 0}),
        (L0Config, {"n_pixels": 0}),
        (L2Config, {"length": 0.5}),
        (SmoothConfig, {"amplitude": 0}),
        (SmoothConfig, {"n_frequencies": 1}),
        (TrojanSquareConfig, {"side": 1.2}),
        (TrojanWatermarkConfig, {"opacity": 0}),
        (WaNetConfig, {"strength": 0}),
        (WaNetConfig, {"grid": 1}),
    ],
)
def test_impossible_triggers_are_refused(kind: type, wrong: dict) -> None:
    with pytest.raises(ValidationError):
        kind(**({"rate": 0.1} | wrong))


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (CleanLabelConfig, {"sources": [1]}, "clean_label poisons samples of the target class alone"),
        (SIGConfig, {"sources": [1]}, "sig poisons samples of the target class alone"),
        (TaCTConfig, {"target": 1}, "class 1 is the target"),
    ],
)
def test_sources_that_cannot_be_poisoned_are_refused(kind: type, wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**({"rate": 0.1} | wrong))
    with pytest.raises(ConfigError, match="source 7 is no class: there are 7, from 0 to 6"):
        BadNetsConfig(rate=0.1, sources=(1, 7)).check_classes(7)
