"""JAX's folder of compiled programs as one file, which can be carried."""

import pathlib
import tarfile

LIMIT_BYTES = 15 * 2**20


def pack(folder: pathlib.Path, path: pathlib.Path,
         limit_bytes: int = LIMIT_BYTES) -> None:
  """Writes the folder's files, the largest left out until it is no larger.

  Compiled programs do not compress further by much, so sizes are those of the
  files.
  """
  files = sorted((f for f in folder.rglob('*') if f.is_file()),
                 key=lambda f: f.stat().st_size)
  total = 0
  with tarfile.open(path, 'w:gz') as tar:
    for file in files:
      total += file.stat().st_size
      if total > limit_bytes:
        break
      tar.add(file, str(file.relative_to(folder)))


def unpack(path: pathlib.Path, folder: pathlib.Path) -> None:
  """Puts the files back; names that leave the folder are refused."""
  with tarfile.open(path) as tar:
    tar.extractall(folder, filter='data')
