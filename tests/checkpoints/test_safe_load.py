from __future__ import annotations

import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from moe_plugin.checkpoints import VerifiedCheckpointIO
from moe_plugin.checkpoints.safe_load import load_file, read_metadata
from moe_plugin.checkpoints.sharded import check_plain, shapes_in
from moe_plugin.errors import CheckpointError
from tests.checkpoints.hostile import KINDS, Canary, hide_, save_folder, state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Unknown:
    pass


class TestHostile:
    @pytest.mark.parametrize("kind", KINDS)
    def test_reading_runs_nothing_and_names_the_type_in_one_line(self, kind, tmp_path):
        canary = tmp_path / "canary"
        path = hide_(kind, tmp_path / "sent.ckpt", canary)
        for read in (check_plain, shapes_in, VerifiedCheckpointIO().load_checkpoint):
            with pytest.raises(
                CheckpointError, match=r"sent\.ckpt.*got 'os\.makedirs'.*trust=true"
            ) as refusal:
                read(path)
            assert "\n" not in str(refusal.value)
        assert not canary.exists()

    @pytest.mark.parametrize("kind", KINDS)
    def test_trusted_reading_runs_it(self, kind, tmp_path):
        """So the canary above would have been hit."""
        canary = tmp_path / "canary"
        path = hide_(kind, tmp_path / "own.ckpt", canary)
        VerifiedCheckpointIO().load_checkpoint(path, weights_only=False)
        assert canary.exists()

    def test_variable_of_torch_lifts_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        path = hide_("file", tmp_path / "sent.ckpt", tmp_path / "canary")
        with pytest.raises(CheckpointError):
            load_file(path)
        assert not (tmp_path / "canary").exists()


class TestLoadFile:
    def test_class_of_the_users_is_named(self, tmp_path):
        torch.save({"model": Unknown()}, tmp_path / "x.pt")
        with pytest.raises(
            CheckpointError, match=r"x\.pt.*got 'tests\.checkpoints\.test_safe_load\.Unknown'"
        ):
            load_file(tmp_path / "x.pt")
        assert isinstance(load_file(tmp_path / "x.pt", trusted=True)["model"], Unknown)

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02", b"text", bytes(range(256))])
    @pytest.mark.parametrize("trusted", [False, True])
    def test_file_that_is_none_is_named_in_one_line(self, content, trusted, tmp_path):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.pt' is damaged or no checkpoint.*\.$") as error:
            load_file(tmp_path / "x.pt", trusted=trusted)
        assert "\n" not in str(error.value)

    def test_missing_file_is_named(self, tmp_path):
        for path in (tmp_path, tmp_path / "absent.pt"):
            with pytest.raises(CheckpointError, match="must be a file, and there is none"):
                load_file(path)


class TestReadMetadata:
    def test_real_metadata_comes_as_pickle_reads_it(self, tmp_path):
        save_folder(tmp_path / "x", state(3) | {"state_dict": {"h": torch.zeros(2, 3, dtype=torch.bfloat16)}})
        read = read_metadata(tmp_path / "x")
        reference = pickle.loads((tmp_path / "x" / ".metadata").read_bytes())
        for name in ("state_dict_metadata", "planner_data", "storage_data", "version"):
            assert getattr(read, name) == getattr(reference, name)

    @pytest.mark.parametrize(
        "program",
        [
            b"cposix\nsystem\n(Vtrue\ntR.",
            b"cbuiltins\neval\n(V1\ntR.",
            b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93.",
            b"\x80\x04\x8c\x05torch\x8c\x04load\x93.",
            b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(dVversion\nVx\nstb.",
            b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n(I0\ntR(dV_value_\nI7\nsb.",
            b"I1\n.",
            b"",
        ],
    )
    def test_anything_else_is_refused_and_changes_nothing(self, program, tmp_path):
        before, encoding = dict(vars(Metadata)), dict(vars(_MEM_FORMAT_ENCODING(0)))
        (tmp_path / ".metadata").write_bytes(program)
        with pytest.raises(CheckpointError, match=r"\.metadata' (must hold|is damaged)"):
            read_metadata(tmp_path)
        assert dict(vars(Metadata)) == before
        assert dict(vars(_MEM_FORMAT_ENCODING(0))) == encoding

    def test_file_outside_the_folder_is_refused(self, tmp_path):
        save_folder(tmp_path / "x", state(1))
        metadata = pickle.loads((tmp_path / "x" / ".metadata").read_bytes())
        for stored in metadata.storage_data.values():
            stored.relative_path = "../y/__0_0.distcp"
        (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=r"must name only files of its folder, got '\.\./y/"):
            check_plain(tmp_path / "x")

    def test_metadata_of_a_rank_is_refused(self, tmp_path):
        """Torch reads it, by pickle, if it fails to read the other one."""
        save_folder(tmp_path / "x", state(1))
        (tmp_path / "x" / "__0.metadata").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
        with pytest.raises(CheckpointError, match=r"__0\.metadata' must not be there"):
            check_plain(tmp_path / "x")

    def test_trusted_metadata_may_name_any_class(self, tmp_path):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
        with pytest.raises(CheckpointError, match="must hold the metadata"):
            read_metadata(tmp_path, trusted=True)
        assert (tmp_path / "canary").exists()
