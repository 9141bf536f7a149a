"""Words: docstrings begin with the number of their equation, and bad settings are refused in a sentence."""
import math
import numpy as np
import pytest
import evaluate, extras, sample
from common import f32
from ddpm import CHOICES, DDPM, discretized_log_likelihood, log_cdf, make_beta
from extras import guidance, likelihood, objectives, samplers
from test_ddpm import at_times

@pytest.mark.parametrize("name, number", [
  ("q_step", "Eq. 2"), ("q_sample", "Eq. 4"), ("q_posterior", "Eq. 6-7"), ("predict_x0", "Eq. 15"),
  ("predict_eps", "Eq. 4"), ("p_mean_var", "Eq. 1,"), ("p_mean_var", "Eq. 11"), ("p_sample", "Algorithm 2, line 4"),
  ("loss_simple", "Eq. 14"), ("squared_error", "Eq. 14"), ("target", "Eq. 14"), ("target", "Eq. 8"),
  ("vlb_term", "Eq. 5"), ("vlb_term", "Eq. 8"), ("vlb_term", "Eq. 13"), ("vlb_weight", "Eq. 12"), ("prior_kl", "Eq. 5"),
  ("score", "Section 3.2")])
def test_docstrings_begin_with_the_number(name, number):
  assert number in getattr(DDPM, name).__doc__.split("\n")[0]

@pytest.mark.parametrize("function, number", [
  (make_beta, "Section 4"), (discretized_log_likelihood, "Eq. 13"), (log_cdf, "Eq. 13"),
  (evaluate.variational_bound, "Eq. 5"), (evaluate.bound, "Eq. 5"), (evaluate.times, "Eq. 5"),
  (evaluate.trajectory_bound, "Eq. 3"), (sample.sample_ddpm, "Algorithm 2"), (sample.draw_x_T, "Algorithm 2, line 1"),
  (sample.ancestral_move, "Algorithm 2, line 4"), (samplers.ddim_move, "Eq. 12"), (samplers.heun, "DDIM, Eq. 14"),
  (samplers.ode, "Eq. 13"), (samplers.sde, "Eq. 6"), (samplers.reverse_sde, "Eq. 6"),
  (samplers.pc, "Algorithms 3 and 5"), (samplers.langevin, "Algorithm 1"), (samplers.at_time, "Eq. 4"),
  (guidance.guided, "Eq. 6")])
def test_docstrings_of_functions(function, number):
  assert number in function.__doc__.strip().split("\n")[0]

@pytest.mark.parametrize("name", ("q_step", "q_sample", "q_posterior", "predict_x0", "predict_eps", "p_mean_var",
                                  "p_sample", "score", "loss_simple", "vlb_term", "prior_kl"))
def test_every_equation_is_a_sentence(name):
  text = getattr(DDPM, name).__doc__
  assert text[0] != " " and text.rstrip().endswith(".")

def test_what_is_not_in_the_paper_says_so():
  assert "not in the paper" in extras.__doc__ and "not in the paper" in DDPM.every.__doc__
  for module in (objectives, guidance, likelihood, samplers):
    assert any(words in module.__doc__ for words in ("in the paper", "paper does not", "Other ways"))

def test_the_choices_and_what_they_mean():
  for kind, words in CHOICES.items():
    for word in (kind, *words): assert word in DDPM.__doc__

@pytest.mark.parametrize("bad, word", [
  ({"T": 0}, "0"), ({"T": -5}, "-5"), ({"T": 2.5}, "2.5"), ({"T": 20000}, "alpha_bar_T"), ({"beta_1": 0}, "0"),
  ({"beta_1": -1e-4}, "-0.0001"), ({"beta_T": 1.0}, "1"), ({"beta_T": math.nan}, "nan"),
  ({"beta_1": math.inf}, "inf"), ({"beta_1": 0.03}, "0.03 and beta_T"), ({"schedule": "line"}, "'line'"),
  ({"sigma": "small"}, "'small'"), ({"predict": "epsilon"}, "'epsilon'")])
def test_bad_settings(bad, word):
  with pytest.raises(ValueError, match=word) as e: DDPM(**bad)
  assert "\n" not in str(e.value)

@pytest.mark.parametrize("times", ([], [5], [0], [5, 5, 0], [0, 5], [5, 1], [5, -1, 0], [1001, 0], [5.5, 0], [5, 9, 0]))
def test_bad_times_of_a_shorter_chain(times):
  with pytest.raises(ValueError, match="times must decrease from at most 1000 to 0") as e: DDPM().every(times)
  assert "\n" not in str(e.value)

x, wrong, double = f32(np.zeros((2, 1, 2, 2))), f32(np.zeros((2, 3, 2, 2))), f32(np.zeros((2, 2, 2, 2)))

@pytest.mark.parametrize("name, args", [
  ("q_step", (x, 0, x)), ("q_step", (x, -1, x)), ("q_sample", (x, 1001, x)), ("q_sample", (x, 1.5, x)),
  ("q_sample", (x, at_times(1), x)), ("q_sample", (x, [1, 2, 3], x)), ("q_sample", (x, [1, 0], x)),
  ("q_sample", (x, f32([1, 2]), x)), ("q_sample", (x, [], x)), ("q_step", (x, 5, wrong)), ("q_sample", (x, 5, wrong)),
  ("q_posterior", (wrong, x, 5)), ("predict_x0", (x, 5, wrong)), ("predict_eps", (x, 5, wrong)),
  ("p_mean_var", (x, 5, double)), ("p_sample", (x, 5, x, wrong)), ("p_sample", (x, 5, wrong, x)),
  ("loss_simple", (lambda x, t: wrong, x, 5, x)), ("loss_simple", (lambda x, t: x, x, 5, wrong)),
  ("vlb_term", (x, x, 5, wrong)), ("vlb_term", (wrong, x, 5, x)), ("score", (x, 5, wrong))])
def test_bad_arguments(name, args):
  with pytest.raises(ValueError, match="time|shapes") as e: getattr(DDPM(), name)(*args)
  assert "\n" not in str(e.value)

@pytest.mark.parametrize("out", (x, wrong))
def test_a_learned_variance_has_as_many_channels_as_the_mean(out):
  d = DDPM(sigma="learned")
  for call in (lambda: d.p_mean_var(x, 5, out), lambda: d.p_sample(x, 5, out, x), lambda: d.vlb_term(x, x, 5, out)):
    with pytest.raises(ValueError, match="shapes"): call()

def test_a_shorter_chain_has_its_own_times():
  with pytest.raises(ValueError, match="within 1..3, not 4"): DDPM().every([900, 500, 20, 0]).q_step(x, 4, x)

def test_bad_shape_in_eq13():
  with pytest.raises(ValueError, match="shapes"): discretized_log_likelihood(x, wrong, 0.1)
