"""What DistServe (OSDI 2024, arXiv 2401.09670v3) published, as data.

Sources: [P] the paper; [B] the lab's blog; [N] saved outputs of the released
evaluation notebook; [C] released scripts; [T] released traces; [F] read off a
figure by a third party, so rough. Rates are requests/s, per GPU where a name
says so; seconds; shares in percent.
"""

from typing import NamedTuple

from dsjax.config.placement import Placement, Plan, Slo


class Case(NamedTuple):
  """An application of Table 1 and what Figs. 8 and 9 and Table 3 say of it.

  tp: of the vLLM and DeepSpeed-MII baselines. plans: prefill's and decode's
  (Table 3). per_gpu: requests of a run for each GPU [C]. rates: probed, per
  GPU [C]. scale_rate: per GPU, where the objectives are scaled. goodput and
  scale: (DistServe, vLLM, MII) at 90 % [N]; None: not measured. curves: name
  -> (rates, attainments) where the notebook prints them [N].
  """

  title: str
  model: str
  lengths: str
  slo: Slo
  tp: int
  plans: tuple
  per_gpu: int
  rates: tuple
  scale_rate: float
  goodput: tuple
  scale: tuple
  curves: dict

  @property
  def placement(self) -> Placement:
    return Placement(prefill=self.plans[:1], decode=self.plans[1:])


_RATES_13B = (.25, .5, 1.0, 1.5, 2.0, 2.25, 2.5, 3.0)
_RATES_66B = (.0625, .125, .25, .375, .5, .625, .75, 1.0)
_66B = (Plan(4, 1), Plan(2, 2))

CASES = {
    '13b': Case(
        'chatbot, OPT-13B', 'opt-13b', 'sharegpt', Slo(.25, .1), 1,
        (Plan(2, 1), Plan(1, 1)), 100, _RATES_13B, 1.5,
        (2.30, .50, .3125), (.667, 1.157, 1.20), {
            'vLLM': (_RATES_13B, (90, 90, 85, 81, 71, 70, 68, 55)),
            'MII': (_RATES_13B, (91, 87, 87, 82, 73, 71, 66, 60))}),
    '66b': Case(
        'chatbot, OPT-66B', 'opt-66b', 'sharegpt', Slo(2.5, .15), 4, _66B, 25,
        _RATES_66B, .75, (.955, .347, .607), (.732, 2.30, 1.32), {}),
    '175b': Case(
        'chatbot, OPT-175B', 'opt-175b', 'sharegpt', Slo(4.0, .2), 8,
        (Plan(3, 3), Plan(4, 3)), 25, (.03125, .0625, .125, .1875, .25), .125,
        (.202, .101, None), (.761, 1.35, None), {}),
    'humaneval': Case(
        'code completion, OPT-66B', 'opt-66b', 'humaneval', Slo(.125, .2), 4,
        _66B, 50, (.125, .375, .625, .875, 1.125, 1.375, 1.625, 2.125), .875,
        (1.144, .20, .720), (.877, 1.19, 1.12), {
            'vLLM': ((.125, .375, .625, .875, 1.125, 1.375, 1.625, 1.875,
                      2.125), (91.5, 86.5, 79.5, 71, 65, 56.5, 38, 36.5,
                               28))}),
    'longbench': Case(
        'summarization, OPT-66B', 'opt-66b', 'longbench', Slo(15.0, .15), 4,
        _66B, 25, (.0625, .125, .25, .375, .5, .625), .375,
        (.53, .125, .30), (.795, 10.0, 2.06), {}),
}

# Fig. 1: OPT-13B, one A100-80GB, 512 in, 64 out [P, B].
FIG1_SLO, FIG1_LENGTHS = Slo(.4, .04), (512, 64)
FIG1 = {'colocated': 1.6, 'prefill only': 5.6, 'decode only': 10.0,
        '2 prefill + 1 decode': 3.3}
# Fig. 3a: prompt length -> (batch from which it is flat, tokens/s) [F].
FIG3 = {128: (16, 9300), 512: (4, 7000), 1024: (1, 5400)}
# Fig. 4: OPT-66B, 2 A100s, 512 tokens [F].
FIG4 = {'crossover_per_s': 3.0, 'intra': (4.0, 1.0), 'inter': (4.5, .7)}
# Fig. 5: OPT-13B, batch 128, input 256; GPUs -> ms, GPUs -> tokens/s [F].
FIG5_BATCH, FIG5_INPUT = 128, 256
FIG5_INTRA_MS = {1: 61, 2: 40, 8: 31}
FIG5_TOKENS = {'inter': {8: 15000}, 'intra': {8: 4000}}
# Fig. 10: per-GPU rate -> percent of prefill queue, prefill, decode queue
# [N]; transfers: seconds -> percent of 175B's requests that take less [F].
FIG10 = {.03: (2, 16, 1), .09: (7, 18, 1), .16: (8, 21, 1), .22: (7, 19, 8),
         .28: (7, 17, 16)}
FIG10_CDF = {.005: 72, .030: 94, .13: 99.5}
# Fig. 11: per-GPU rates of the ablation (script) [C]; objectives of the
# script; vLLM++'s best is vLLM's TP4 [P]; attainments of a draft of April
# 2024 in the history, the final values are not public.
FIG11_SLO = Slo(.4, .1)
FIG11_RATES = (.0625, .125, .25, .375, .5, .625, .75)
FIG11 = {'DistServe': (99.3, 99.3, 95.3, 88, 81.3, 77.3, 63.3),
         'vLLM': (62, 62, 58, 56, 48, 32, 28)}
# Fig. 12: GPUs -> seconds; from a draft plot, likely placeholders. The
# paper's text: 1.3 minutes at most, on 96 cores.
FIG12 = {2: 5, 4: 15, 8: 30, 16: 35, 32: 100}
# Table 2: rate -> vLLM real, simulated, DistServe-Low real, simulated [P].
TABLE2 = {
    1.0: (97.0, 96.8, 100.0, 100.0), 1.5: (65.5, 65.1, 100.0, 100.0),
    2.0: (52.8, 51.0, 99.3, 99.3), 2.5: (44.9, 46.1, 87.3, 88.3),
    3.0: (36.7, 38.3, 83.0, 84.1), 3.5: (27.8, 29.0, 77.3, 77.0),
    4.0: (23.6, 24.1, 70.0, 68.9)}
# Released traces of OPT-13B ShareGPT, 0.25 and 0.1 s: (system, total
# requests/s, requests) -> attainment on the trace [T], and what the released
# simulator says when it is run. vLLM's requests are 100 s at the rate: that
# is what the shares are multiples of.
TRACES = {
    ('DistServe', 3.0, 300): (98.3, 98.3), ('DistServe', 4.5, 300):
    (96.7, 96.3), ('DistServe', 6.0, 300): (95.3, 95.0),
    ('DistServe', 6.0, 600): (64.7, 70.2), ('DistServe', 7.5, 300):
    (79.7, 88.7), ('DistServe', 9.0, 300): (62.7, 74.3),
    ('DistServe', 12.0, 300): (42.0, 41.0), ('vLLM', 1.0, 100): (86.0, 71.0),
    ('vLLM', 1.5, 150): (84.7, 75.3), ('vLLM', 2.0, 200): (66.5, 69.0),
    ('vLLM', 2.5, 250): (78.0, 63.2), ('vLLM', 3.0, 300): (34.0, 46.0),
    ('vLLM', 3.5, 350): (25.4, 21.7), ('vLLM', 4.0, 400): (8.0, 8.2)}
# A fit of OPT-175B in the history, ms: tp 3, pp 3 prefill a token; decode's
# constant; both of one stage.
HISTORY_175B_MS = (.16304, 27.40)
