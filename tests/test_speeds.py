from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdwn.preflight.estimate import (
    CARDS,
    Card,
    find_card,
    published_speed,
    scaled,
)

REPOSITORY = Path(__file__).resolve().parent.parent
BY_NAME = {card.name: card for card in CARDS}
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(REPOSITORY / "benchmarks")
    PAGE = runpy.run_path(str(REPOSITORY / "benchmarks/gpus.py"))
floor = PAGE["floor"]


def gpu_hours(card: Card) -> float:
    return 262_040 / float(floor(card)) / 3600


@pytest.mark.process
def test_the_page_is_what_its_script_prints() -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks" / "gpus.py"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        check=True,
    )
    assert done.stdout == (REPOSITORY / "benchmarks" / "gpus.md").read_bytes()


def test_an_image_is_84_6_teraflop() -> None:
    assert round(PAGE["TERA_FLOP_PER_IMAGE"], 1) == 84.6


def test_torch_counts_the_same_work_in_the_unet() -> None:
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    # diffusers' defaults are Stable Diffusion 1's, but for the width of the text's embedding.
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet = UNet2DConditionModel(cross_attention_dim=768)
        unet(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768))
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964
    assert counter.get_total_flops() / 2e9 == pytest.approx(PAGE["UNET_GMAC"], abs=0.05)


@pytest.mark.parametrize(("name", "speed", "hours"), [("A100", 3.69, 19.7), ("H100", 11.7, 6.2)])
def test_floors(name: str, speed: float, hours: float) -> None:
    assert floor(BY_NAME[name]) == pytest.approx(speed, abs=0.005)
    assert gpu_hours(BY_NAME[name]) == pytest.approx(hours, abs=0.05)


def test_published_speeds() -> None:
    plain = {batch: round(speed, 2) for batch, speed in BY_NAME["A100"].plain.items()}
    assert plain == {1: 0.62, 2: 0.84, 4: 1.03, 8: 1.14, 10: 1.15, 16: 1.18, 32: 1.2, 64: 1.21}
    found = {card.name: round(published_speed(card), 2) for card in CARDS}
    assert found == {
        "T4": 0.14, "V100": 0.54, "RTX 3090": 0.56, "RTX 4090": 1.08, "A100": 1.21, "H100": 3.06,
        "H200": 3.18,
    }  # fmt: skip
    assert published_speed(BY_NAME["A100"], way="whole") == pytest.approx(1.45, abs=0.005)
    assert published_speed(BY_NAME["A100"], way="blocks") == published_speed(
        BY_NAME["A100"], way="whole"
    )
    assert published_speed(BY_NAME["H200"], 20, way="blocks") == 3.43
    assert published_speed(BY_NAME["H100"], 16, way="whole") == pytest.approx(1.28, abs=0.005)
    assert published_speed(BY_NAME["H100"], 30) == 2.96


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_no_card_exceeds_its_peak(card: Card) -> None:
    speeds = [*card.plain.values(), *card.blocks.values(), *card.whole.values()]
    assert all(0 < speed < floor(card) for speed in speeds)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_cards_are_found_by_device_name(device: str, name: str) -> None:
    assert find_card(device) is BY_NAME[name]


@pytest.mark.parametrize(
    "device",
    [
        "",
        "NVIDIA T400",
        "NVIDIA RTX A1000",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "AMD Instinct MI250X",
    ],
)
def test_other_cards_are_not_taken_for_these(device: str) -> None:
    assert find_card(device) is None


def test_scaling_is_identity_at_the_reference() -> None:
    assert scaled(1.21, 512, 512, 50, 7.5) == pytest.approx(1.21)


def test_guidance_off_nearly_doubles_the_speed() -> None:
    assert scaled(1.0, 512, 512, 50, 1.0) == pytest.approx(1.94, abs=0.005)


@given(st.integers(8, 2048), st.integers(8, 2048), st.integers(1, 200), st.floats(0, 20))
def test_more_work_is_slower(width: int, height: int, steps: int, guidance: float) -> None:
    speed = scaled(1.0, width, height, steps, guidance)
    assert speed > scaled(1.0, width + 8, height, steps, guidance) > 0
    assert speed > scaled(1.0, width, height + 8, steps, guidance)
    assert speed > scaled(1.0, width, height, steps + 1, guidance)
    assert speed >= scaled(1.0, width, height, steps, guidance + 1)
