"""Words: docstrings begin with the number of their equation, and bad settings are refused in a sentence."""
import math
import numpy as np
import pytest
import beyond, ddpm, evaluate
from common import f32
from ddpm import DDPM, discretized_log_likelihood
from test_ddpm import at_times

@pytest.mark.parametrize("name, number", [
  ("q_step", "Eq. 2"), ("q_sample", "Eq. 4"), ("q_posterior", "Eq. 6-7"), ("predict_x0", "Eq. 15"),
  ("predict_eps", "Eq. 4"), ("p_mean_var", "Eq. 1,"), ("p_mean_var", "Eq. 11"), ("p_sample", "Algorithm 2, line 4"),
  ("loss_simple", "Eq. 14"), ("vlb_term", "Eq. 5"), ("vlb_term", "Eq. 13"), ("prior_kl", "Eq. 5"),
  ("score", "Section 3.2")])
def test_docstrings_begin_with_the_number(name, number):
  assert number in getattr(DDPM, name).__doc__.split("\n")[0]

@pytest.mark.parametrize("function, number", [
  (ddpm.make_beta, "Section 4"), (ddpm.discretized_log_likelihood, "Eq. 13"), (ddpm.log_cdf, "Eq. 13"),
  (ddpm.kl_normal, "Eq. 5"), (evaluate.bound, "Eq. 5"), (evaluate.times, "Eq. 5"), (evaluate.trajectory_bound, "Eq. 3"),
  (evaluate.rate_distortion, "Figure 5"), (evaluate.save_rate_distortion, "Figure 5")])
def test_docstrings_of_functions(function, number):
  assert number in function.__doc__.split("\n")[0]

def test_what_is_not_in_the_paper_says_so():
  assert "What the paper does not" in beyond.__doc__ and "beyond.py" in evaluate.__doc__

def test_the_choices_and_what_they_mean():
  for word in ("schedule", "sigma", "predict", "linear", "cosine", "quad", "const", "beta_tilde", "eps", "x0", "mu"):
    assert word in DDPM.__doc__

@pytest.mark.parametrize("bad,word", [
  ({"T": 0}, "0"), ({"T": -5}, "-5"), ({"T": 2.5}, "2.5"), ({"T": 20000}, "alpha_bar_T"), ({"beta_1": 0}, "0"),
  ({"beta_1": -1e-4}, "-0.0001"), ({"beta_T": 1.0}, "1"), ({"beta_T": math.nan}, "nan"),
  ({"beta_1": math.inf}, "inf"), ({"beta_1": 0.03}, "0.03 > 0.02"), ({"schedule": "line"}, "'line'"),
  ({"sigma": "learned"}, "'learned'"), ({"predict": "v"}, "'v'")])
def test_bad_settings(bad, word):
  with pytest.raises(ValueError, match=word): DDPM(**bad)

x, wrong = f32(np.zeros((2, 1, 2, 2))), f32(np.zeros((2, 3, 2, 2)))
same, bad_model = lambda x, t: x, lambda x, t: wrong

@pytest.mark.parametrize("name,args", [
  ("q_step", (x, 0, x)), ("q_sample", (x, 1001, x)), ("q_sample", (x, 1.5, x)), ("q_sample", (x, at_times(1), x)),
  ("q_sample", (x, [1, 2, 3], x)), ("q_sample", (x, f32([1, 2]), x)), ("q_posterior", (x, x, 5, 5)),
  ("q_posterior", (x, x, 5, 6)), ("q_posterior", (x, x, 5, -1)), ("p_sample", (same, x, [5, 9], x, 7)),
  ("q_step", (x, 5, wrong)), ("q_sample", (x, 5, wrong)),
  ("q_posterior", (wrong, x, 5)), ("p_sample", (same, x, 5, wrong)), ("p_sample", (bad_model, x, 5, x)),
  ("loss_simple", (bad_model, x, 5, x)), ("score", (bad_model, x, 5)), ("predict_eps", (x, 5, wrong))])
def test_bad_arguments(name, args):
  with pytest.raises(ValueError, match="time|below|shapes"): getattr(DDPM(), name)(*args)

def test_bad_shape_in_eq13():
  with pytest.raises(ValueError, match="shapes"): discretized_log_likelihood(x, wrong, 0.1)
