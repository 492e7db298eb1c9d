"""The disk is measured where runs will be, and nothing is left there."""

from pathlib import Path

from bagualu.launch.machine.disk import disk_figures


def test_a_folder_that_does_not_exist_yet_is_measured_in_the_one_above_it(tmp_path: Path) -> None:
    found = disk_figures(tmp_path / "runs" / "tiny", 2**20)
    assert found.path == str(tmp_path)
    assert min(found.write_bytes_per_second, found.read_bytes_per_second, found.sync_seconds, found.free_bytes) > 0
    assert list(tmp_path.iterdir()) == []
