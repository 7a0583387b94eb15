"""Files of tensors: read as their packages write them, refused in one line where they cannot be."""

import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from bn_jax.errors import ConfigError
from bn_jax.weights import tensor_files

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.c": np.array(7, np.int64),
    "empty": np.zeros((0, 4), np.float16),
}


def refused(path, match):
    with pytest.raises(ConfigError, match=match) as error:
        tensor_files.read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def require_equal(found, want):
    assert found.keys() == want.keys()
    for name, array in want.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_safetensors_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensor_files.safetensors_bytes(TENSORS, {"x": "y"}))
    file = tensor_files.read(path)
    require_equal(file.tensors, TENSORS)
    assert file.metadata == {"x": "y"}
    path.write_bytes(tensor_files.safetensors_bytes({"f": np.asfortranarray(TENSORS["a"])}, {}))
    require_equal(tensor_files.read(path).tensors, {"f": TENSORS["a"]})
    assert tensor_files.read(path).metadata == {}


def test_npz_and_msgpack(tmp_path):
    np.savez(tmp_path / "x.npz", **{"a/b": TENSORS["a"]})
    tree = {"params": {"dense": {"kernel": TENSORS["a"]}}}
    (tmp_path / "x.msgpack").write_bytes(serialization.to_bytes(tree))
    require_equal(tensor_files.read(tmp_path / "x.npz").tensors, {"a/b": TENSORS["a"]})
    found = tensor_files.read(tmp_path / "x.msgpack").tensors
    require_equal(found, {"params/dense/kernel": TENSORS["a"]})


def test_bfloat16_in_an_npz_is_read_as_such(tmp_path):
    """numpy writes the format's bytes and loses its name: it reads them as two raw bytes."""
    values = np.array([1.0, -2.5, 3e38], ml_dtypes.bfloat16)
    np.savez(tmp_path / "x.npz", bias=values)
    found = tensor_files.read(tmp_path / "x.npz").tensors["bias"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), values.astype(np.float32))


def test_an_npz_of_texts_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", names=np.array(["a", "b"]))
    refused(tmp_path / "x.npz", "names has dtype <U1.* save it as float32")


def test_pickles_are_refused_unopened_with_the_lines_that_convert_them(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("it was unpickled",))

    bomb = pickle.dumps(Bomb())
    for name in ("x.pth", "x.pt", "renamed.npz", "renamed.safetensors", "renamed.msgpack"):
        path = tmp_path / name
        path.write_bytes(bomb)
        line = refused(path, "is a pickle.*not opened.*weights_only=True")
        code = line.partition('python -c "')[2].rstrip('"')
        compile(code, name, "exec")
        assert "torch.load(" in code and path.stem in code
    for protocol in range(2, 6):
        path = tmp_path / "renamed.npz"
        path.write_bytes(pickle.dumps({"a": [1.0] * 40}, protocol))
        refused(path, "is a pickle.*not opened")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:  # torch.save since 1.6
        archive.writestr("archive/data.pkl", bomb)
    refused(tmp_path / "zip.npz", "is a pickle")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    refused(tmp_path / "objects.npz", "not an npz file of plain arrays: Object arrays")


def test_tensorflow_checkpoints_are_refused_with_the_lines_that_convert_them(tmp_path):
    for name in ("inception_v2.ckpt", "inception_v2.ckpt.index"):
        (tmp_path / name).write_bytes(b"\0" * 32)
        line = refused(tmp_path / name, "TensorFlow's own format")
        assert "load_checkpoint" in line and "inception_v2.ckpt')" in line
        compile(line.partition('python -c "')[2].rstrip('"'), name, "exec")


def test_damaged_files_are_refused(tmp_path):
    whole = tensor_files.safetensors_bytes(TENSORS, {})
    header = whole.index(b"}", 8)
    for damaged in (
        b"",
        whole[:4],
        whole[:20],
        whole[:-1],
        whole[: header - 3] + b"9" + whole[header - 2 :],
        whole.replace(b'"F32"', b'"F99"'),
        whole.replace(b"data_offsets", b"data_offset5"),
        whole.replace(b"[2,3]", b"[2,4]"),
        b"\xff" * 8 + whole[8:],
        (2).to_bytes(8, "little") + b"[]",
    ):
        path = tmp_path / "x.safetensors"
        path.write_bytes(damaged)
        refused(path, "safetensors")
    for suffix in (".npz", ".msgpack"):
        path = tmp_path / f"x{suffix}"
        for data in (b"", b"PK\3\4", b"\xc1\xc1", b"\x81"):
            path.write_bytes(data)
            refused(path, "is no")
    (tmp_path / "leaf.msgpack").write_bytes(serialization.to_bytes({"params": {"x": "text"}}))
    refused(tmp_path / "leaf.msgpack", "params/x is of type str, not an array")


def test_other_kinds_and_absent_files(tmp_path):
    refused(tmp_path / "none.npz", "No such file")
    refused(tmp_path, "Is a directory")
    (tmp_path / "x.txt").write_text("hello")
    refused(tmp_path / "x.txt", r"files end in .safetensors, .npz or .msgpack")


def test_a_header_of_a_pickles_length_is_no_pickle(tmp_path):
    """640 bytes of header are b'\\x80\\x02', as pickles begin."""
    for pad in range(700):
        data = tensor_files.safetensors_bytes(TENSORS, {"x": "y" * pad})
        if data[:2] == b"\x80\x02":
            break
    assert data[:2] == b"\x80\x02"
    (tmp_path / "x.safetensors").write_bytes(data)
    require_equal(tensor_files.read(tmp_path / "x.safetensors").tensors, TENSORS)


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", "x.msgpack"])
def test_stand_ins_for_a_file_are_named(tmp_path, name):
    """(A header that is too large; pickled data that could be loaded unsafely; extra data.)"""
    path = tmp_path / name
    path.write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 45000000\n"
    )
    refused(path, "pointer of Git LFS.*git lfs pull")
    path.write_bytes(b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>")
    refused(path, "web page.*fetch the file again")


def test_a_whole_train_state_is_refused_with_the_remedy(tmp_path):
    """(It said only that `step` is an int.)"""
    state = {"params": {"a": np.ones(2)}, "opt_state": {"trace": np.ones(2)}, "step": 3}
    path = tmp_path / "x.msgpack"
    path.write_bytes(serialization.to_bytes(state))
    refused(path, "step is of type int, not an array: save params and batch_stats alone")
