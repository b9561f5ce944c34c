"""Sources over bytes in memory, at random, and what they mean: whole tensors, in torch, without any cut."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st

from workers.kernels.low_rank import Product, add_products
from workers.kernels.reference import TORCH_DTYPES, round_to
from workers.methods import get_method
from workers.methods.evaluate import merge_tensor
from workers.random import mask_key
from workers.sources import (
    Arithmetic,
    Change,
    Derived,
    Gathered,
    LowRank,
    ModelInput,
    RowRun,
    Source,
    TensorRef,
)

DTYPES = ("F32", "BF16", "F16")


def ref(name: str, numel: int, dtype: str = "F32", start: int = 0) -> TensorRef:
    """A tensor that a file of its own holds."""
    nbytes = numel * TORCH_DTYPES[dtype].itemsize
    return TensorRef(f"file:///{name}/model.safetensors", "e", start, start + nbytes, dtype)


class Objects:
    """Objects in memory: the part of a store that reads."""

    def __init__(self) -> None:
        self.bytes: dict[str, bytearray] = {}

    def add(self, tensor: torch.Tensor, dtype: str, odd: int = 0, uri: str | None = None) -> TensorRef:
        """Keep a tensor in an object of its own, ``odd`` bytes after its beginning."""
        uri = uri or f"s3://m{len(self.bytes)}/model.safetensors"
        raw = tensor.to(TORCH_DTYPES[dtype]).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        self.bytes[uri] = bytearray(odd) + raw
        return TensorRef(uri, "e", odd, odd + len(raw), dtype)

    def read_into(self, uri: str, start: int, buffer: memoryview, etag: str) -> None:
        """As :meth:`workers.store.base.ObjectStore.read_into`."""
        found = self.bytes[uri][start : start + len(buffer)]
        assert len(found) == len(buffer)
        buffer[:] = found

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """A range's elements."""
        raw = self.bytes[ref.uri][ref.start : ref.end]
        return torch.frombuffer(raw, dtype=TORCH_DTYPES[ref.dtype]) if raw else torch.empty(0)

    def value(self, source: Source) -> torch.Tensor:
        """The elements of a source that is a whole tensor, shape ``[n]``, in its dtype."""
        if isinstance(source, TensorRef):
            return self.tensor(source)
        if isinstance(source, LowRank):
            run = self.value(source.source)
            out = torch.empty_like(run)
            add_products(
                run, [self._product(c, *source.shape) for c in source.changes], 0, source.shape[1], out
            )
            return out
        if isinstance(source, Gathered):
            values = [self.value(each) for each in source.sources]
            return torch.cat([_taken(values, run, TORCH_DTYPES[source.dtype]) for run in source.runs])
        return self._merged(source)

    def _product(self, change: Change, rows: int, columns: int) -> Product:
        a, b = self.tensor(change.a), self.tensor(change.b)
        if change.transposed:
            rank = b.numel() // columns
            return Product(a.view(rank, rows).T, b.view(columns, rank).T, change.scale)
        rank = b.numel() // rows
        return Product(b.view(rows, rank), a.view(rank, columns), change.scale)

    def _merged(self, source: Derived) -> torch.Tensor:
        arithmetic = source.arithmetic
        method = get_method(arithmetic.method)
        merged = merge_tensor(
            method,
            method.parameters.model_validate(arithmetic.parameters),
            [method.model_parameters.model_validate(model.parameters) for model in arithmetic.models],
            None if arithmetic.base is None else self.value(arithmetic.base),
            [self.value(model.ref) for model in arithmetic.models],
            mask_keys=[mask_key(arithmetic.seed, m.index, arithmetic.name) for m in arithmetic.models],
        )
        return round_to(merged, TORCH_DTYPES[source.dtype])


def _taken(values: list[torch.Tensor], run: RowRun, dtype: torch.dtype) -> torch.Tensor:
    taken = [values[number][at : at + run.numel].float() for number, at in run.takes]
    if not taken:
        return torch.zeros(run.numel, dtype=dtype)
    total = taken[0]
    for other in taken[1:]:
        total = total + other
    return round_to(total / torch.tensor([len(taken)]), dtype)


@st.composite
def sources(draw: st.DrawFn, objects: Objects, rows: int, columns: int, depth: int = 2) -> Source:
    """A source of a matrix of this shape, made of others of at most ``depth``."""
    seed = draw(st.integers(0, 1 << 20))
    numel, dtype = rows * columns, draw(st.sampled_from(DTYPES))

    def stored(count: int, odd: int = 0) -> TensorRef:
        generator = torch.Generator().manual_seed(seed + len(objects.bytes))
        return objects.add(torch.randn(count, generator=generator), draw(st.sampled_from(DTYPES)), odd)

    def nested() -> Source:
        return draw(sources(objects, rows, columns, depth - 1))

    kind = draw(st.sampled_from(["ref", "low_rank", "gathered", "derived"])) if depth else "ref"
    if kind == "low_rank":
        changes = []
        for rank in draw(st.lists(st.sampled_from([0, 1, 5, 64]), max_size=2)):
            turned = draw(st.booleans())
            out, into = (columns, rows) if turned else (rows, columns)
            changes.append(Change(stored(rank * into), stored(out * rank), math.pi * rank, turned))
        return LowRank("low_rank", nested(), tuple(changes), (rows, columns), 0)
    if kind == "gathered":
        of = tuple(nested() for _ in range(draw(st.integers(1, 2))))
        runs, left = [], numel
        while left:
            count = draw(st.integers(1, left))
            takes = st.tuples(st.integers(0, len(of) - 1), st.integers(0, numel - count))
            runs.append(RowRun(count, tuple(draw(st.lists(takes, max_size=3)))))
            left -= count
        return Gathered("gathered", of, tuple(runs), dtype)
    if kind == "derived":
        models = tuple(ModelInput(k, nested(), {"weight": 0.3 + k}) for k in range(draw(st.integers(1, 2))))
        plain = Arithmetic("t", "linear", {}, None, models, seed, numel, 0, numel)
        sparse = tuple(replace(m, parameters=m.parameters | {"density": 0.5}) for m in models)
        dropped = replace(plain, method="dare_linear", base=nested(), models=sparse)
        return Derived("derived", draw(st.sampled_from([plain, dropped])), dtype)
    return stored(numel, draw(st.sampled_from([0, 1, 2])))


def bits(elements: torch.Tensor) -> bytes:
    """The elements' bytes, NaN written one way."""
    data: bytes = np.asarray(round_to(elements.float(), elements.dtype).view(torch.uint8)).tobytes()
    return data
