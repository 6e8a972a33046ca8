"""Losses with a group: several Gloo processes, of uneven rows, against one with the whole batch."""

from functools import partial

import distributed_cases as cases
import processes
import pytest
import torch
from torch import distributed as dist

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{0} processes".format)
def results(request, tmp_path_factory) -> list[dict]:
    """Of each process what `every_case` found."""
    worker = partial(cases.every_case, size=request.param, dtypes=tuple(TOLERANCE))
    folder = tmp_path_factory.mktemp("group")
    if request.param > 1:
        return processes.run(worker, request.param, folder / "store")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        return [worker(0)]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", cases.CASES)
def test_every_process_has_the_loss_and_gradients_of_the_whole_batch(name: str, results: list[dict]) -> None:
    """The contract: the value is the same on every process, and what DistributedDataParallel makes of the
    gradients, their mean over processes, or with scaling="sum" their sum, is that of one process with the
    concatenated batch, be it to rows, temperature or bias."""
    size, seen = len(results), 0
    for key in results[0]:
        if key[0] != name:
            continue
        _, dtype, strategy, *options = key
        terms = "none" in options
        rows, whole = cases.inputs(name, cases.SIZES[size], dtype)
        across = {"reduction": "none"} if terms else {}
        loss, to_rows, to_whole = cases.evaluate(name, rows, whole, **across)
        factor, limit = 1 if options or size == 1 else 1 / size, TOLERANCE[dtype]
        if terms:
            assert sum(len(result[key][0].flatten()) for result in results) == len(loss.flatten())
            squares = sum(result[key][0].square().sum() for result in results)
            _assert_close(squares, loss.square().sum(), limit)
        else:
            for result in results:
                _assert_close(result[key][0], loss, limit)
                assert result[key][0] == results[0][key][0]
        for k, expected in to_rows.items():
            _assert_close(torch.cat([result[key][1][k] for result in results]) * factor, expected, limit)
        for k, expected in to_whole.items():
            _assert_close(sum(result[key][2][k] for result in results) * factor, expected, limit)
        seen += 1
    assert seen >= 2 * len(cases.CASES[name].strategies)


def _assert_close(x, expected: torch.Tensor, limit: float) -> None:
    error = (x - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < limit, f"{error:.2g}"
