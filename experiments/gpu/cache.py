"""JAX's folder of compiled programs as one file, which can be carried."""

import io
import pathlib
import tarfile
import zlib

from dsjax.config.checks import InputError, require

LIMIT_BYTES = 15 * 2**20


def pack(folder: pathlib.Path, path: pathlib.Path,
         limit_bytes: int = LIMIT_BYTES) -> None:
  """Writes the folder's files, the largest left out until it is no larger.

  Compiled programs do not compress further by much, so sizes are those of the
  files.
  """
  files = sorted((f for f in folder.rglob('*') if f.is_file()),
                 key=lambda f: f.stat().st_size)
  total, made = 0, io.BytesIO()  # a file that is there is whole
  with tarfile.open(fileobj=made, mode='w:gz', compresslevel=1) as tar:
    for file in files:
      total += file.stat().st_size
      if total > limit_bytes:
        break
      tar.add(file, str(file.relative_to(folder)))
  path.write_bytes(made.getvalue())


def unpack(path: pathlib.Path, folder: pathlib.Path) -> None:
  """Puts the files back.

  Raises:
    InputError: it is no such file: names that leave the folder, links, more
      than LIMIT_BYTES, damage.
  """
  try:
    with tarfile.open(path) as tar:
      members = tar.getmembers()
      require(all(m.isreg() for m in members) and sum(
          m.size for m in members) <= LIMIT_BYTES, '--cache', str(path),
              f'of plain files, {LIMIT_BYTES >> 20} MiB together at most')
      tar.extractall(folder, members, filter='data')
  except (tarfile.TarError, EOFError, zlib.error) as error:
    raise InputError(f'--cache: {path}: {error}') from None
