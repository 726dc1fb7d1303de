from __future__ import annotations

from moe_plugin.apps.report.stopped import can_go_on, read_stopped, write_stopped


class TestStopped:
    def test_line_is_read_as_it_was_written(self, tmp_path):
        assert read_stopped(tmp_path) is None
        write_stopped(tmp_path, "failed: out of memory")
        assert read_stopped(tmp_path) == "failed: out of memory"

    def test_run_can_go_on_only_where_the_line_names_a_checkpoint(self, tmp_path):
        assert not can_go_on(tmp_path)
        write_stopped(tmp_path, "stopped by SIGTERM after step 1; nothing was saved")
        assert not can_go_on(tmp_path)
        write_stopped(tmp_path, "stopped by SIGTERM after step 1; go on with ckpt_path=last.ckpt")
        assert can_go_on(tmp_path)
