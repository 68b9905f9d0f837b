"""Writes the tokenizer of a GGUF as a Hugging Face folder.

  python -m experiments.tokenizer_folder --out=out/tokenizer

Load generators such as aiperf and guidellm count tokens with transformers and
would fetch the tokenizer from the hub; this folder is what they take instead
(aiperf --tokenizer=out/tokenizer). A model that came as a Hugging Face folder
is one already. Says what it wrote and checks on a text that both give the same
ids.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders

from dsjax.checkpoints import checkpoint, gguf_file, gguf_tokenizer
from dsjax.config.checks import require
from experiments.common import cli

_CONTROL = 3  # GGUF's type of a control token
_TEXT = 'Why is the sky blue? Ολα καλά \U0001f41d 12345'

FLAGS = {'model': cli.Flag('smollm2-135m-instruct', 'Name or .gguf file.'),
         'out': 'out/tokenizer'}


def write(meta: Mapping[str, Any], out: pathlib.Path) -> tokenizers.Tokenizer:
  """Writes tokenizer.json and tokenizer_config.json of a GGUF's metadata.

  Returns:
    the tokenizers.Tokenizer.
  """
  require(meta.get('tokenizer.ggml.model') == 'gpt2', '--model',
          meta.get('tokenizer.ggml.model'), "byte-level BPE ('gpt2')")
  tokens = meta['tokenizer.ggml.tokens']
  types = meta.get('tokenizer.ggml.token_type') or [1] * len(tokens)
  bpe = gguf_tokenizer.gguf_bpe(
      meta['tokenizer.ggml.pre'], {t: i for i, t in enumerate(tokens)},
      meta['tokenizer.ggml.merges'])
  bpe.decoder = decoders.ByteLevel()
  bpe.add_special_tokens([tokenizers.AddedToken(t, special=True) for t, kind
                          in zip(tokens, types, strict=True)
                          if kind == _CONTROL])
  out.mkdir(parents=True, exist_ok=True)
  bpe.save(str(out / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast',
            'chat_template': meta.get('tokenizer.chat_template')}
  for name in ('bos', 'eos'):
    if id := meta.get(f'tokenizer.ggml.{name}_token_id'):
      config[f'{name}_token'] = tokens[id]
  (out / 'tokenizer_config.json').write_text(json.dumps(config, indent=1))
  return bpe


def run(model: str, out: pathlib.Path) -> None:
  """Writes the folder and checks it."""
  path = checkpoint.find(model)
  require(path.suffix == '.gguf', '--model', str(path), 'a .gguf file')
  meta, _ = gguf_file.read_gguf(path)
  bpe = write(meta, out)
  ours = gguf_tokenizer.load(path).encode(_TEXT)
  theirs = bpe.encode(_TEXT, add_special_tokens=False).ids
  require(list(ours) == theirs, 'ids', theirs, f'{ours}')
  print(f'{out}: {bpe.get_vocab_size()} tokens, the same ids on a text')


if __name__ == '__main__':
  cli.main(lambda options, _: run(options.model, pathlib.Path(options.out)),
           FLAGS)
