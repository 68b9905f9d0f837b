import struct

import numpy as np
import pytest

from dsjax.checkpoints.checkpoint import find
from dsjax.checkpoints.gguf_file import read_gguf
from dsjax.config.checks import InputError
from tests.checkpoints.gguf_model_test import NAME, save

gguf = pytest.importorskip('gguf')


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'model.gguf'


def error_of(path):
  with pytest.raises(InputError) as error:
    read_gguf(path)
  assert str(path) in str(error.value)
  return str(error.value)


def test_header_is_what_the_gguf_package_reads():
  path = find(NAME)
  meta, tensors = read_gguf(path)
  reader = gguf.GGUFReader(path)
  assert {k: f.contents() for k, f in reader.fields.items()
          if not k.startswith('GGUF.')} == meta
  assert [t.name for t in reader.tensors] == list(tensors)
  for want in reader.tensors[::40]:
    got = tensors[want.name]
    assert got.kind == want.tensor_type
    assert got.shape == tuple(reversed(want.shape.tolist()))
    np.testing.assert_array_equal(got.data, want.data.view(np.uint8))


def test_a_missing_file(path):
  assert 'no such file' in error_of(path)


@pytest.mark.parametrize('data', [b'', b'GG', b'PK\x03\x04' + bytes(100)])
def test_not_a_gguf(path, data):
  path.write_bytes(data)
  assert 'not a GGUF' in error_of(path)
  path.write_bytes(b'version https://git-lfs.github.com/spec/v1\n')
  assert 'a pointer of Git LFS' in error_of(path)


@pytest.mark.parametrize('version', [1, 4, 3 << 24])
def test_another_version(path, version):
  path.write_bytes(b'GGUF' + struct.pack('<IQQ', version, 0, 0))
  assert f'version {version}' in error_of(path)


def test_truncated_anywhere(path):
  data = save(path).read_bytes()
  for size in (*range(4, 300), *range(300, len(data) - 32, 501)):
    path.write_bytes(data[:size])
    assert 'truncated' in error_of(path)
