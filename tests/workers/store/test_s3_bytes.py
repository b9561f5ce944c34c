"""Bodies and buffers on their way to and from S3."""

from __future__ import annotations

import io

import pytest
from botocore.exceptions import IncompleteReadError
from botocore.response import StreamingBody
from hypothesis import given
from hypothesis import strategies as st

from workers.store import s3_bytes

pytestmark = pytest.mark.fast


@given(size=st.integers(1, 10_000), longest=st.integers(1, 10_000))
def test_spans_are_few_equal_and_gapless(size: int, longest: int) -> None:
    spans = s3_bytes.spans(size, longest)
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == size
    lengths = {span.stop - span.start for span in spans}
    assert max(lengths) <= longest
    assert max(lengths) - min(lengths) <= 1
    assert (len(spans) - 1) * longest < size


def test_nothing_has_no_spans() -> None:
    assert s3_bytes.spans(0, 10) == []


@given(
    data=st.binary(max_size=100), sizes=st.lists(st.integers(-1, 40), max_size=10), start=st.integers(0, 100)
)
def test_a_body_reads_as_a_file_does(data: bytes, sizes: list[int], start: int) -> None:
    ours, file = s3_bytes.body(memoryview(b"xx" + data)[2:]), io.BytesIO(data)
    assert len(ours) == len(data)
    for size in sizes:
        assert (ours.read(size), ours.tell()) == (file.read(size), file.tell())
    for whence, offset in ((io.SEEK_SET, min(start, len(data))), (io.SEEK_END, 0), (io.SEEK_CUR, -len(data))):
        assert ours.seek(offset, whence) == file.seek(offset, whence)
    assert ours.read(None) == file.read(None)
    assert ours.read() == b""


def test_a_body_is_the_buffer_itself() -> None:
    data = bytearray(b"0123456789")
    body = s3_bytes.body(memoryview(data))
    piece = body.read(4)
    data[0:2] = b"ab"
    assert piece == b"ab23"
    assert s3_bytes.body(b"bytes") == b"bytes"


class _Unknown(io.BytesIO):
    """A response that nothing is known to lie below of, as another version of urllib3 may have."""

    released = False

    def release_conn(self) -> None:
        self.released = True


def test_an_unknown_kind_of_response_is_read_as_boto3_offers_it() -> None:
    buffer, response = bytearray(10), _Unknown(b"0123456789")
    s3_bytes.fill(memoryview(buffer), StreamingBody(response, 10))
    assert buffer == b"0123456789"
    assert response.released


def test_an_unknown_kind_of_response_that_ends_early() -> None:
    response = _Unknown(b"01234")
    with pytest.raises(IncompleteReadError):
        s3_bytes.fill(memoryview(bytearray(10)), StreamingBody(response, 10))
    assert response.closed
    assert not response.released
