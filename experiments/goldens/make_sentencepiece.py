"""Writes a tiny vocabulary of sentencepiece, and what it makes of texts.

`pieces`, `scores` and `types` as a GGUF of the model 'llama' has them (byte
fallback, no normalisation, a space before each text), and [text, ids] pairs.
Run where `sentencepiece` is installed (dsjax itself need not be):

  python -m experiments.goldens.make_sentencepiece

Two seconds. Expected output: `420 pieces, 18 texts`.
"""

import io
import json
import pathlib
import random

from absl import app, flags

from experiments.common.extras import needs

with needs('peers'):
  import sentencepiece

_OUT = flags.DEFINE_string('out', 'tests/goldens/sentencepiece.json',
                           'file to write')
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_SIZE = 420
_TEXTS = [
    'the cat sat on the mat', 'the', ' the', '  the  cat  ', 'unseen \u8a9e',
    '\u00e9t\u00e9 \u00e0 la mer', 'a\nb\tc', '\U0001f41d', '', ' ',
    'thethethe', 'mat-sat.', '12 345', '<0x41> <s> </s>', '\u2581the',
    'Cat CAT cat', 'hat tea sheath teeth seat aaaaaaa tatata ethathe',
    'aeaeateathhsatsethaaetteahheatasteht']


def main(argv: list[str]) -> None:
  del argv
  rng = random.Random(0)
  # Few letters: most words can be merged in several orders.
  lines = [' '.join(''.join(rng.choices('atehs', (5, 3, 3, 2, 1), k=rng.randint(
      1, 9))) for _ in range(8)) + ' the m\u00e9t\u00e9o' for _ in range(200)]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines), model_writer=model, model_type='bpe',
      vocab_size=_SIZE, byte_fallback=True, add_dummy_prefix=True,
      remove_extra_whitespaces=False, normalization_rule_name='identity',
      character_coverage=1.0, minloglevel=2, hard_vocab_limit=False)
  whole = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  ids = range(whole.get_piece_size())
  pathlib.Path(_OUT.value).write_text(json.dumps({
      'pieces': [whole.id_to_piece(i) for i in ids],
      'scores': [whole.get_score(i) for i in ids],
      'types': [_UNKNOWN if whole.is_unknown(i) else
                _CONTROL if whole.is_control(i) else
                _BYTE if whole.is_byte(i) else _NORMAL for i in ids],
      'texts': [[text, whole.encode(text)] for text in _TEXTS]}) + '\n')
  print(f'{len(ids)} pieces, {len(_TEXTS)} texts')


if __name__ == '__main__':
  app.run(main)
