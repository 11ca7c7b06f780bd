"""Overlap of collectives with computing, on traces made by hand and on random intervals counted tick by tick."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.profiler import ProfileData

from parallel.overlap import Kernel, ProfileError, covered, overlap, overlaps, read_overlap

MATMUL, GATHER = "sm90_xmma_gemm_bf16", "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
SEND, SCATTER = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "ncclDevKernel_ReduceScatter_Sum_bf16"
COPY = "MemcpyD2D"
MICROSECOND = 1e-6


def trace(planes: dict[str, dict[str, list[tuple[str, int, int]]]]) -> str:
    """Text of a trace: by plane and line, events (name, first microsecond, microseconds)."""
    text = ""
    for plane, lines in planes.items():
        names = sorted({name for events in lines.values() for name, _, _ in events})
        text += f'planes {{ name: "{plane}"\n'
        for line, events in lines.items():
            text += f'lines {{ name: "{line}" timestamp_ns: 5000\n'
            for name, begin, length in events:
                number = names.index(name) + 1
                text += f"events {{ metadata_id: {number} offset_ps: {begin * 10**6} duration_ps: {length * 10**6} }}\n"
            text += "}\n"
        for number, name in enumerate(names, start=1):
            text += f'event_metadata {{ key: {number} value {{ id: {number} name: "{name}" }} }}\n'
        text += "}\n"
    return text


GPU = {
    "Stream #13(Compute)": [(MATMUL, 0, 100), (MATMUL, 150, 50), (COPY, 110, 30)],
    "Stream #17(Compute)": [(GATHER, 80, 40), (SEND, 160, 20), (SCATTER, 210, 40)],
    "XLA Ops": [("all-gather", 0, 1000)],
}
"""Of 100 us of collectives 20 + 20 are hidden; the copy computes nothing, and the line of operations is no stream."""
HOST = {"python": [(MATMUL, 0, 500)]}


def test_hidden_and_exposed_time_of_a_trace() -> None:
    other = {"Stream #13(Compute)": [(MATMUL, 0, 10)]}
    found = overlaps(
        ProfileData.from_text_proto(
            trace({"/host:CPU": HOST, "/device:GPU:1": other, "/device:GPU:0": GPU, "/device:GPU:2": {}})
        )
    )
    assert list(found) == ["/device:GPU:0", "/device:GPU:1"]
    first, second = found.values()
    microseconds = {name: value / MICROSECOND for name, value in vars(first).items() if name != "by_kind"}
    assert microseconds == pytest.approx({"span": 250, "computing": 150, "collective": 100, "hidden": 40})
    assert first.exposed == pytest.approx(60 * MICROSECOND)
    assert first.idle == pytest.approx(40 * MICROSECOND)
    assert first.hidden_share == pytest.approx(0.4)
    kinds = {kind: seconds / MICROSECOND for kind, seconds in first.by_kind.items()}
    assert kinds == pytest.approx({"AllGather": 40, "SendRecv": 20, "ReduceScatter": 40})
    assert (second.collective, second.hidden_share, second.by_kind) == (0, 1, {})


def test_traces_are_read_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="needs one trace"):
        read_overlap(tmp_path)
    file = tmp_path / "plugins" / "profile" / "now" / "host.xplane.pb"
    file.parent.mkdir(parents=True)
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(trace({"/device:GPU:0": GPU})))
    assert read_overlap(tmp_path)["/device:GPU:0"].exposed == pytest.approx(60 * MICROSECOND)
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(trace({"/host:CPU": HOST})))
    with pytest.raises(ProfileError, match="no kernel of a GPU"):
        read_overlap(tmp_path)


Spans = list[tuple[float, float]]
spans = st.tuples(st.integers(0, 40), st.integers(0, 10)).map(lambda pair: (float(pair[0]), float(sum(pair))))


@given(st.lists(spans), st.lists(spans, min_size=1))
def test_sums_equal_a_count_of_ticks(computing: Spans, collective: Spans) -> None:
    def ticks(intervals: Spans) -> set[int]:
        return {tick for begin, end in intervals for tick in range(int(begin), int(end))}

    kernels = [Kernel(MATMUL, *span) for span in computing] + [Kernel(GATHER, *span) for span in collective]
    found = overlap(kernels)
    assert found.hidden * 1e9 == pytest.approx(len(ticks(computing) & ticks(collective)))
    assert found.exposed * 1e9 == pytest.approx(len(ticks(collective) - ticks(computing)))
    assert covered(computing) == len(ticks(computing))
