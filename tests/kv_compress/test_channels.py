"""Keys per channel: the maths against a plain formula, where pages are coded against counting by hand, the policy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.core.errors import InputError, UsageError
from kv_compress._channels import decode_channels, encode_channels
from kv_compress._coded_pages import CodingPoints
from kv_compress.policy import Coding, KVPolicy, LayerPolicy


def plain(x: np.ndarray, highest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole codes, scale and lowest number of one channel, number by number."""
    lowest = np.float16(min(x))
    if float(lowest) > min(x):
        lowest = np.nextafter(lowest, np.float16(-np.inf))
    wanted = (np.float32(max(x)) - np.float32(lowest)) / np.float32(highest)
    scale = np.float16(wanted)
    if float(scale) < wanted:
        scale = np.nextafter(scale, np.float16(np.inf))
    step = np.float32(scale) if scale else np.float32(1)
    codes = [min(max(round(float((np.float32(n) - np.float32(lowest)) / step)), 0), highest) for n in x]
    return np.array(codes), scale, lowest


@pytest.mark.parametrize(("codec", "highest"), [("int4", 15), ("int8", 255)])
def test_codes_are_those_of_a_plain_formula(codec: str, highest: int) -> None:
    x = torch.randn(48, 3, 8, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-4, 3, 8)
    x[:, 0, 5] += 900.3  # a bias as Qwen2 has them
    x[:, 1, 2], x[:, 2, 1] = 0, -0.3
    codes, numbers = encode_channels(codec, x)
    seen = decode_channels(codec, codes, numbers.expand(48, -1, -1, -1))
    for g in range(3):
        for d in range(8):
            wanted, scale, lowest = plain(x[:, g, d].numpy(), highest)
            assert (numbers[0, g, d].item(), numbers[1, g, d].item()) == (float(scale), float(lowest))
            byte = codes[:, g, d % 4 if codec == "int4" else d].numpy()
            found = byte if codec == "int8" else byte >> 4 if d > 3 else byte & 15
            assert (found == wanted).all()
            assert (seen[:, g, d].numpy() == wanted.astype(np.float32) * np.float32(scale) + np.float32(lowest)).all()
    # No number is further off than half a code, the largest included; a code is hardly wider than it must be.
    steps = numbers[0].float()
    assert ((seen - x).abs() <= steps / 2 * 1.001 + 1e-6).all()
    assert (steps <= ((x.amax(0) - x.amin(0)) + x.amin(0).abs() * 2**-10) / highest * 1.002 + 1e-7).all()


def test_no_number_stays_no_number() -> None:
    x = torch.ones(4, 1, 2)
    x[2, 0, 1] = torch.nan
    codes, numbers = encode_channels("int8", x)
    seen = decode_channels("int8", codes, numbers.expand(4, -1, -1, -1))
    assert seen[:, 0, 1].isnan().all() and (seen[:, 0, 0] == 1).all()


def by_hand(points: CodingPoints, tokens: int) -> list[list[tuple[bool, list[int]]]]:
    """What each entry of the table holds once so many tokens are stored, for each number of tokens from 0 on."""
    table: list[tuple[bool, list[int]]] = []
    found, blocks = [list(table)], 0
    for position in range(tokens):
        if not table or table[-1][0] or len(table[-1][1]) == points.block:
            table.append((False, []))
        table[-1] = (False, [*table[-1][1], position])
        end = points.sinks + (blocks + 1) * points.page_tokens * points.together
        if position + 1 == end + points.recent:
            block = list(range(end - points.page_tokens * points.together, end))
            first = next(index for index, (_, held) in enumerate(table) if held[0] == block[0])
            count = points.page_tokens * points.together // points.block
            assert [at for _, held in table[first : first + count] for at in held] == block
            size = points.page_tokens
            table[first : first + count] = [(True, block[at : at + size]) for at in range(0, len(block), size)]
            blocks += 1
        found.append(list(table))
    return found


@pytest.mark.parametrize("numbers", [(4, 20, 4, 5, 1), (2, 4, 0, 0, 1), (1, 3, 2, 1, 1), (4, 8, 0, 9, 1),
                                     (3, 12, 6, 3, 1), (4, 6, 4, 3, 2), (2, 3, 2, 0, 2)])  # fmt: skip
def test_tables_are_those_counted_by_hand(numbers: tuple[int, int, int, int, int]) -> None:
    *plain_numbers, together = numbers
    points = CodingPoints(*plain_numbers, "", together)
    tables = by_hand(points, 90)
    held = [0]  # pages held at each number of tokens before anything is coded there
    for stored, table in enumerate(tables):
        coded = points.coded(stored)
        assert coded == sum(is_coded for is_coded, _ in table)
        for index, (is_coded, tokens) in enumerate(table):
            size = points.page_tokens if is_coded else points.block
            begin = points.sinks if is_coded else 0
            assert points.entry(index, coded) == (is_coded, (tokens[0] - begin) // size)
        if stored:
            is_due = coded > points.coded(stored - 1)
            held.append(len(table) + is_due * (points.page_tokens // points.block - 1 if together == 1 else 1))
        passed = coded // together
        last = points.position(passed) if passed else 0
        assert -(-points.slots(stored) // points.block) == len(table)
        following = points.after(points.slots(last), last, 0)
        assert following is not None and following.position == points.position(passed + 1)
        assert following.kept == points.slots(following.position)
    for last in (0, *(at for at in range(1, 91) if points.coded(at) > points.coded(at - 1))):
        for end in range(last, 91, 7):
            peak = points.peak(points.slots(last), last, 0, end)
            assert -(-peak // points.block) == max([len(tables[last]), *held[last + 1 : end + 1]])
    peaks = [max(held[: stored + 1]) for stored in range(91)]
    for pages in range(1, peaks[-1]):
        assert points.longest(pages) == sum(peak <= pages for peak in peaks) - 1


def test_a_page_holds_what_fits_into_its_bytes() -> None:
    """Two heads of 16 channels in fp32, pages of 16 tokens: 4,096 bytes."""
    sizes = [(2, 16)] * 3
    policy = KVPolicy.uniform("int4", 3, keys="channel", sinks=4, recent=9)
    # A token takes 2 · (8 + 8 + 4) bytes of codes and numbers, the channels of a page 2 · 16 · 4: 99 tokens, 6 pages.
    points = policy.coding_points(sizes, 4, 16)
    assert (points.page_tokens, points.together, points.sinks) == (96, 1, 16)
    assert policy.coding_points(sizes, 2, 16).page_tokens == 48
    mixed = replace(policy, layers=(*policy.layers[:2], LayerPolicy(Coding("int8", per="channel"), Coding("int8"))))
    # Two layers of 40 bytes and one of 2 · (16 + 18), and 3 · 128: (3 · 4,096 - 384) / 148 = 80.4.
    assert mixed.coding_points(sizes, 4, 16).page_tokens == 80
    # 8 bits are a little more than half of 16: 28 tokens fit into 2,048 bytes at 68, 24 are one page and a half.
    eight = KVPolicy.uniform("int8", 3, keys="channel", recent=8).coding_points(sizes, 2, 16)
    assert (eight.page_tokens, eight.together, eight.every) == (24, 2, 48)
    with pytest.raises(UsageError, match="holds only 16 that are coded"):
        KVPolicy.uniform("full", 3, recent=4).coding_points(sizes, 4, 16)
    with pytest.raises(UsageError, match="holds only 1 that are coded"):
        policy.coding_points(sizes, 2, 1)


def test_a_policy_travels_and_says_what_cannot_be() -> None:
    policy = KVPolicy.uniform("int4", 2, keys="channel", sinks=4, recent=64)
    data = policy.to_json()
    assert data["layers"][0] == {"keys": {"codec": "int4", "per": "channel"}, "values": {"codec": "int4"}}
    assert (data["sinks"], data["recent"]) == (4, 64)
    assert KVPolicy.parse(data) == policy and policy.is_paged and not KVPolicy.uniform("int4", 2).is_paged
    policy.require_fits([(2, 16)] * 2)
    for broken in (data | {"recent": -1}, data | {"sinks": True}, data | {"recent": 1 << 30}):
        with pytest.raises(InputError, match="must be a whole number of tokens"):
            KVPolicy.parse(broken)
    keys = Coding("int4", per="channel")
    for layer, message in (
        (LayerPolicy(keys, keys), "only keys are coded per channel"),
        (LayerPolicy(replace(keys, codec="fp8", scale=(1.0,))), "with int8 or int4"),
        (LayerPolicy(replace(keys, rotate=True)), "without rotation"),
    ):
        with pytest.raises(InputError, match=message):
            KVPolicy((layer,)).require_fits([(2, 16)])
    with pytest.raises(InputError, match="eviction cannot drop single tokens"):
        replace(policy, eviction={"budget": {"tokens": 64}}).require_fits([(2, 16)] * 2)
