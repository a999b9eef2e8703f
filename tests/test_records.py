"""Files of records: damage is found and named with what to do, and nothing of it is read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from gcalib.records import read, write

VALUES = pa.table({"run_id": ["a" * 16], "figure": [0.1234567890123456]})


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("records/a.parquet", "delete it to run it again"),
        ("curves/a.parquet", "delete it, and .*records.a.parquet, to run it again"),
        ("records/compacted.parquet", "restore it from a copy; without it they have to run again"),
    ],
)
def test_what_to_do_about_a_damaged_file_depends_on_what_it_holds(tmp_path: Path, place: str, remedy: str) -> None:
    path = tmp_path / place
    write(path, VALUES)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{path.name} cannot be read .*: .*{remedy}"):
        read(path)


def test_a_flipped_bit_of_a_figure_is_found(tmp_path: Path) -> None:
    path = tmp_path / "records" / "a.parquet"
    write(path, VALUES)
    content = path.read_bytes()
    figure = VALUES["figure"].combine_chunks().buffers()[1].to_pybytes()[:8]
    assert content.count(figure) == 1
    place = content.index(figure)
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ValueError, match="cannot be read"):
        read(path)
    path.write_bytes(content)
    assert read(path).equals(VALUES)
