"""train.py: the step against float64, what is drawn, and runs that are stopped, killed, continued or refused."""
import argparse, json, math, os, re, signal, subprocess, sys, time, tracemalloc
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from common import ROOT, TINY, close, f32, rng
from PIL import Image
from tinygrad import Device, GlobalCounters, Tensor
import sample, train
from ddpm import DDPM
from files import checkpoint
from files.weights import read_tensors, write_tensors

SMALL = ["--dataset", "glyphs", "--batch", "8", "--channels", "8", "--channel-mult", "1", "--attn", "",
         "--norm-groups", "4", "--sample-every", "0", "--T", "50", "--no-class-conditional", "--min-snr", "0"]

def at_times(*t): return Tensor(np.array(t, np.int32))

def run(out, *flags): train.main([*SMALL, "--out", str(out), *map(str, flags)])

def contents(out):
  return {f.name: f.read_bytes() for f in sorted(Path(out).iterdir()) if f.is_file() and f.name != "log.jsonl"}

def losses(out):
  log = Path(out)/"log.jsonl"
  return [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.exists() else []

def test_resume_is_exact_and_seeds_matter(tmp_path):
  run(tmp_path/"a", "--steps", 6, "--save-every", 3, "--dropout", 0.1)
  run(tmp_path/"b", "--steps", 4, "--save-every", 2, "--dropout", 0.1)
  with open(tmp_path/"b"/"log.jsonl", "a") as f:
    f.write('{"step": 5, "loss": 0}\n{"st')  # as a killed run would leave it
  run(tmp_path/"b", "--steps", 6, "--save-every", 3, "--dropout", 0.1)
  assert (contents(tmp_path/"a") == contents(tmp_path/"b") and losses(tmp_path/"a") == losses(tmp_path/"b")
          and len(losses(tmp_path/"a")) == 6)
  with pytest.raises(ValueError, match="lr"): run(tmp_path/"b", "--steps", 8, "--dropout", 0.1, "--lr", 1e-5)
  with pytest.raises(ValueError, match="channels|network"):
    run(tmp_path/"b", "--steps", 8, "--dropout", 0.1, "--channels", 16)
  run(tmp_path/"b", "--restart", "--steps", 2, "--dropout", 0.1, "--seed", 1)
  assert losses(tmp_path/"b")[0] != losses(tmp_path/"a")[0]

def test_a_number_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path, monkeypatch):
  run(tmp_path, "--steps", 2, "--save-every", 1)
  before, draw = contents(tmp_path), train.draw
  def broken(*args):
    x, t, eps, *rest = draw(*args)
    return x, t, eps * np.float32(np.nan if args[-1] == 4 else 1), *rest
  monkeypatch.setattr(train, "draw", broken)
  with pytest.raises(ValueError, match="step 4.*nan.*last.safetensors"): run(tmp_path, "--steps", 6, "--save-every", 10)
  assert contents(tmp_path) == before

def step_once(accum=1, gpus=1, steps=2, **flags):
  """The state after some steps on noise, and what came out of each."""
  a = train.arguments([*SMALL, "--accum", str(accum), "--gpus", str(gpus),
                       *(f for k, v in flags.items() for f in (f"--{k}", str(v)))])
  config = dict(TINY, channel_mult=a.channel_mult, attn_resolutions=(), dropout=a.dropout)
  base = Device.DEFAULT.split(":")[0]
  state = train.State(config, (Device.DEFAULT,) if gpus == 1 else tuple(f"{base}:{i}" for i in range(gpus)))
  step, images, seen = (train.make_step(state, DDPM(T=a.T), a),
                        rng().integers(0, 256, (8, 1, 8, 8), np.uint8), [])
  for n in range(1, steps+1):
    x, t, eps, y, seeds = train.draw(a, images, np.zeros(8, np.int32), 0, n)
    part = 8//accum
    for k in range(accum):
      h = np.array([k == accum-1, *train.hyper(a, n)], np.float32)
      before = {name: state.fetch(f).copy() for name, f in state.flat.items()}
      norm, *loss = step(*state.given(h, *(v[k*part:(k+1)*part] for v in (x, t, eps, y, seeds))))
      after = {name: state.fetch(f).copy() for name, f in state.flat.items()}
      seen.append((np.concatenate([v.numpy() for v in loss]), float(state.fetch(norm)), before, after, h,
                   GlobalCounters.mem_used))
  return seen

@pytest.mark.quick
def test_adam_clipping_and_average_against_float64():
  for _, norm, before, after, h, _ in step_once(clip=0.5):
    g = after["grad"][0].astype(np.float64)
    assert abs(norm - np.sqrt((g*g).sum())) < 1e-4 * norm
    g *= min(1, 0.5/norm)
    lr, c1, c2, decay = h[1:].astype(np.float64)
    m, v = 0.9*before["m"] + 0.1*g, 0.999*before["v"] + 0.001*g*g
    w = before["raw"] - lr * (m/c1) / (np.sqrt(v/c2) + 1e-8)
    for name, want in (("m", m), ("v", v), ("raw", w), ("ema", decay*before["ema"] + (1-decay)*w)):
      np.testing.assert_allclose(after[name], want, rtol=1e-4, atol=1e-7, err_msg=name)
    assert np.abs(after["raw"] - after["ema"]).max() > 0  # the average is no alias of the weights

def test_parts_of_a_batch_and_several_devices_give_the_same_step():
  one = step_once()
  last = lambda seen: (seen[-1][1], seen[-1][3]["m"])
  for other in (step_once(accum=2), step_once(gpus=4) if Device.DEFAULT == "CPU" else one):
    assert abs(last(other)[0] - last(one)[0]) < 1e-3 * last(one)[0]
    np.testing.assert_allclose(last(other)[1], last(one)[1], atol=2e-5)

def test_times_are_drawn_by_their_weight_in_the_bound():
  # the weight of ‖ε − ε_θ‖² is half of what log SNR loses in a step, up to its square
  for flags in ([], ["--schedule", "quad", "--beta-1", "1e-6", "--beta-T", "0.03"]):
    a = train.arguments(["--times", "weighted", "--batch", "64", *flags])
    d = DDPM(a.T, a.beta_1, a.beta_T, a.schedule)
    w, p = train.chances(a.T, a.beta_1, a.beta_T, a.schedule)
    snr = d.alpha_bar[1:] / (1 - d.alpha_bar[1:])
    lost = -np.diff(np.log(snr))
    for v in (w, p): assert v[0] == 0 and v.sum() == pytest.approx(1) and len(v) == 1001
    close(w[102:] / w[500], lost[100:] / lost[498], rtol=0.05)
    assert w[1] / w[500] == pytest.approx(1 / (lost[498] + lost[498]**2/2), rel=0.05)  # β₁/(α₁(1−ᾱ₁)) is 1/α₁
    rarer = (p / p[1])[1:] / (w / w[1])[1:]  # 1 down to SNR 1, then a tenth at SNR 1/100
    close(rarer[snr >= 1], 1)
    close(np.interp(math.log(100), -np.log(snr), rarer), 0.1, rtol=0.01)
    # with γ = 100 the same at the other end: at SNR 10,000 a hundredth of the weight, a tenth of the draws
    for v, u, least in zip(train.chances(a.T, a.beta_1, a.beta_T, a.schedule, 100), (w, p), (0.01, 0.1)):
      less = v[1:] / u[1:] * (u[500] / v[500])
      close(less[snr <= 100], 1)
      assert v[0] == 0 and v.sum() == pytest.approx(1) and (np.diff(less) > -1e-9).all()
      if snr[0] > 1e4: close(np.interp(-math.log(1e4), -np.log(snr), less), least, rtol=0.01)
    t = np.stack([train.draw(a, np.zeros((64, 1, 8, 8), np.uint8), np.zeros(64, np.int32), 0, n)[1]
                  for n in range(1, 201)])
    for low, high in ((1, 1), (2, 10), (11, 300), (301, 1000)):
      want, inside = p[low:high+1].sum() * 64, ((t >= low) & (t <= high)).sum(1)
      assert abs(inside.mean() - want) < 5*np.sqrt(want/200)
      assert np.abs(inside - want).max() <= 1  # one from each stratum
    assert abs(np.corrcoef(np.arange(64).repeat(200), t.T.ravel())[0, 1]) < 5/np.sqrt(t.size)  # whichever the image
  # so drawn, L_vlb's estimate is what evenly drawn times give
  model = lambda x, t: x * 0.9
  d, eps = DDPM(T=20), f32(rng(2).standard_normal((20, 1, 4, 4)))
  x0 = f32(rng(1).integers(0, 256, (20, 1, 4, 4)) / 127.5 - 1)
  L = d.vlb_term(model, x0, at_times(*range(1, 21)), eps).numpy().astype(np.float64)
  p = train.chances(20, 1e-4, 0.02, "linear")[1][1:]
  t = rng().choice(20, 200_000, p=p)
  assert (L[t] / p[t]).mean() == pytest.approx(L.sum(), rel=5 * (L[t] / p[t]).std() / L.sum() / math.sqrt(200_000))

@pytest.mark.parametrize("loss", ("simple", "vlb"))
def test_errors_that_clipping_mends_and_weighted_times(loss):
  """A new network answers ε_θ = 0, so x̂_0 is beyond the edge that x_0 lies on wherever ε points outwards: no error
  there with --clip-x0. Elsewhere it is ε, also where x̂_0 is beyond the edge and x_0 within."""
  a = train.arguments([*SMALL, "--clip-x0", "--batch", "64", "--loss", loss, "--times", "weighted"])
  d, state = DDPM(T=a.T), train.State(dict(TINY, channel_mult=a.channel_mult, attn_resolutions=()), (Device.DEFAULT,))
  images = rng(7).choice(np.array([0, 100, 255], np.uint8), (64, 1, 8, 8))
  x, t, eps, y, seeds = train.draw(a, images, np.zeros(64, np.int32), 0, 1)
  t = np.maximum(t, 2)  # L_0 is no squared error
  before = state.fetch(state.flat["raw"])
  h = np.array([1, *train.hyper(a, 1)], np.float32)
  got = train.make_step(state, d, a)(*state.given(h, x, t, eps, y, seeds))[1].numpy()
  mended = (x == 0) & (eps < 0) | (x == 255) & (eps > 0)
  assert 0.2 < mended.mean() < 0.45 and np.abs(state.fetch(state.flat["raw"]) - before).max() > 0
  want = (eps**2 * ~mended).reshape(64, -1).mean(1)
  if loss == "vlb":  # Eq. 12; σ_t² = β_t is not the posterior's variance, which adds what does not depend on the model
    r = d.beta_tilde[t] / d.beta[t]
    want = (want * d.beta[t] / (d.alpha[t] * (1 - d.alpha_bar[t])) + r - 1 - np.log(r)) / 2 / math.log(2)
  # so that the mean over draws is that over even ones, or, of L_simple, with L_vlb's weights
  w, p = train.chances(a.T, a.beta_1, a.beta_T, a.schedule)
  want *= w[t] / p[t] if loss == "simple" else 1 / (a.T * p[t])
  close(got, want, rtol=2e-4)

@pytest.mark.parametrize("times", ("uniform", "weighted"))
def test_min_snr_weights(times):
  """Above γ the weight γ/SNR turns the error of ε into γ times that of x̂_0, Eq. 15; a new network answers ε_θ = 0."""
  a = train.arguments([*SMALL, "--batch", "64", "--min-snr", "5", "--times", times])
  d, state = DDPM(T=a.T), train.State(dict(TINY, channel_mult=a.channel_mult, attn_resolutions=()), (Device.DEFAULT,))
  x, t, eps, y, seeds = train.draw(a, rng(7).integers(0, 256, (64, 1, 8, 8), np.uint8), np.zeros(64, np.int32), 0, 1)
  h = np.array([1, *train.hyper(a, 1)], np.float32)
  got = train.make_step(state, d, a)(*state.given(h, x, t, eps, y, seeds))[1].numpy()
  x0, squared = x / 127.5 - 1, lambda v: (np.asarray(v, np.float64)**2).reshape(64, -1).mean(1)
  x_t = d.q_sample(f32(x0), at_times(*t), f32(eps))
  in_x0 = squared(d.predict_x0(x_t, at_times(*t), x_t * 0).numpy() - x0)
  clear = d.alpha_bar[t] > 5/6                                # SNR > 5
  assert 0.2 < clear.mean() < 0.8
  want = np.where(clear, 5 * in_x0, squared(eps))
  if times == "weighted":  # each t counts as in L_vlb, of which it is min(SNR, γ)/SNR; an error of 1 everywhere is 1
    (w, _), (_, p) = [train.chances(a.T, a.beta_1, a.beta_T, a.schedule, g) for g in (0, 5)]
    all_t = np.minimum(1, 5 * (1 - d.alpha_bar[1:]) / d.alpha_bar[1:])
    want *= w[t] / p[t] / (w[1:] * all_t).sum()
  close(got, want, rtol=1e-3)
  for flags in (["--loss", "vlb"], ["--predict", "x0"]):
    with pytest.raises(ValueError, match="--min-snr"): train.arguments([*SMALL, "--min-snr", "5", *flags])

def test_dequantized_images_and_dropped_labels():
  images = rng().integers(0, 256, (64, 1, 8, 8), np.uint8)
  draw = lambda *flags: train.draw(train.arguments([*SMALL, "--batch", "64", *flags]),
                                   images, np.zeros(64, np.int32), 9, 1)
  whole, spread = draw()[0], draw("--dequantize")[0]
  u = spread - whole
  assert whole.dtype == np.uint8 and u.min() >= -0.5 and u.max() <= 0.5 and abs(u.std() - 12**-0.5) < 0.01
  assert abs(np.corrcoef(u.ravel(), draw()[2].ravel())[0, 1]) < 5 / 64
  for p in (0, 0.5, 1): assert abs((draw("--drop-labels", str(p))[3] == 9).mean() - p) < 0.3
  assert (draw("--drop-labels", "0")[3] == 0).all() and (draw("--drop-labels", "1")[3] == 9).all()

def test_warm_up_and_average():
  a = train.arguments(["--warmup", "10", "--lr", "0.1", "--ema", "0.99", "--anneal", "0"])
  assert (train.hyper(a, 1)[0] == pytest.approx(0.01)
          and train.hyper(a, 10)[0] == train.hyper(a, 99)[0] == pytest.approx(0.1))
  assert train.hyper(a, 1)[3] == pytest.approx(2/11) and train.hyper(a, 10**6)[3] == 0.99
  a = train.arguments(["--warmup", "10", "--lr", "0.1", "--anneal", "100"])
  assert [train.hyper(a, n)[0] for n in (1, 51, 100, 101, 500)] == pytest.approx([0.01, 0.05, 0.001, 0, 0])
  assert train.arguments(["--dataset", "cifar10"]).lr == 2e-4 and train.arguments(["--dataset", "cifar10"]).flip

def test_the_learning_rate_falls_to_0_at_the_end_of_the_preset_or_of_a_longer_run(tmp_path):
  rate = lambda n, *flags: train.hyper(train.arguments(list(flags)), n)[0]
  for dataset in ("mnist", "glyphs", "fashion_mnist"):
    steps, lr = [train.PRESETS[dataset][k] for k in ("steps", "lr")]
    short, long = ("--dataset", dataset, "--steps", "10"), ("--dataset", dataset, "--steps", str(2*steps))
    assert rate(steps//2 + 1, *short) == rate(steps + 1, *long) == pytest.approx(lr/2) and rate(steps + 1, *short) == 0
    assert rate(steps + 1, *short, "--anneal", "0") == lr
    # the preset's weights are for L_simple of ε with t drawn evenly, and for nothing else
    for flags, gamma in (([], 5), (["--loss", "vlb"], 0), (["--predict", "x0"], 0), (["--times", "weighted"], 0)):
      assert train.arguments(["--dataset", dataset, *flags]).min_snr == gamma
  assert rate(10**6, "--dataset", "cifar10") == 2e-4
  # a run knows its own, whatever --steps is when it goes on; beyond its end it would learn nothing
  run(tmp_path, "--steps", 2, "--batch", 1)
  run(tmp_path, "--steps", 3, "--batch", 1)
  with pytest.raises(ValueError, match="0 from step 2500 on.*--init"): run(tmp_path, "--steps", 2501, "--batch", 1)

def test_every_t_is_trained_and_the_draws_are_independent():
  a = train.arguments([*SMALL, "--batch", "64", "--T", "20"])
  draws = [train.draw(a, np.zeros((64, 1, 8, 8), np.uint8), np.zeros(64, np.int32), 10, n) for n in range(1, 201)]
  t, eps = np.concatenate([d[1] for d in draws]), np.concatenate([d[2] for d in draws])
  counts = np.bincount(t, minlength=21)
  # T and 1 as often as the others
  assert counts[0] == 0 and len(counts) == 21 and np.abs(counts[1:] - 640).max() < 5*np.sqrt(640)
  assert abs(eps.mean()) < 5/np.sqrt(eps.size) and abs(eps.std() - 1) < 5/np.sqrt(eps.size)
  flat = eps.reshape(len(eps), -1)
  for other in (t, sample.draw_x_T(len(t), (1, 1, 1), a.seed).numpy().ravel()):
    assert np.abs([np.corrcoef(other, flat[:, j])[0, 1] for j in range(0, 64, 8)]).max() < 5/np.sqrt(len(t))
  assert len({d[2].tobytes() for d in draws}) == 200
  assert abs(np.mean([d[3] == 10 for d in draws]) - 0.1) < 0.02  # labels dropped

@pytest.mark.parametrize("flags,match", [
  (["--batch", "0"], "--batch.*'0'"), (["--steps", "-5"], "--steps.*'-5'"), (["--lr", "nan"], "--lr.*'nan'"),
  (["--ema", "1"], "--ema"), (["--dropout", "1"], "--dropout"), (["--T", "0"], "--T.*'0'"),
  (["--channel-mult", "0,1"], "--channel-mult"), (["--accum", "3"], "--accum 3"), (["--clip", "-1"], "--clip"),
  (["--min-snr", "-1"], "--min-snr"), (["--channel-mult", ""], "--channel-mult"), (["--attn", "x"], "--attn"),
  (["--drop-labels", "1.1"], "--drop-labels"), (["--image-size", "0"], "--image-size"), (["--nonsense"], "--nonsense"),
  # L_0 needs exact levels, and so does what clipping mends
  (["--dequantize", "--loss", "vlb"], "--dequantize.*--loss"), (["--dequantize", "--clip-x0"], "--clip-x0")])
def test_flags_out_of_range(flags, match):
  with pytest.raises(ValueError, match=match) as refused: train.arguments([*SMALL, *flags])
  assert "\n" not in str(refused.value)

def test_help_says_what_is_the_papers(capsys):
  with pytest.raises(SystemExit) as end: train.arguments(["--help"])
  says = capsys.readouterr().out
  groups = {part.split(":\n")[0]: part for part in re.split(r"\n\n(?=\w)", says)}
  where = {flag: name for name, part in groups.items() for flag in re.findall(r"^  (--[\w-]+)", part, re.MULTILINE)}
  assert end.value.code == 0 and len(where) >= 38
  for flag, name in (("--out", "the run"), ("--beta-T", "the paper's"), ("--warmup", "the authors' code's"),
                     ("--clip", "the authors' code's"), ("--min-snr", "not in the paper")):
    assert where[flag].startswith(name), where

@pytest.mark.parametrize("program,flags,says", [
  ("train.py", ["--dataset", "nonsense"], "nonsense"), ("train.py", ["--out", "/proc/x"], "/proc/x"),
  ("sample.py", ["--checkpoint", "missing.safetensors"], "missing.safetensors"),
  ("evaluate.py", ["--checkpoint", "missing.safetensors"], "missing.safetensors"),
  ("train.py", ["--dataset", "glyphs", "--channels", "12", "--norm-groups", "5"], "groups")])
def test_programs_end_with_one_sentence(program, flags, says, tmp_path):
  r = subprocess.run([sys.executable, str(ROOT/program), *flags],
                     capture_output=True, text=True, cwd=tmp_path)
  assert r.returncode and says in r.stderr.splitlines()[-1] and "Traceback" not in r.stderr, r.stderr

def test_no_device_and_no_compiler(tmp_path):
  for env, says in (({"DEV": "NOSUCH"}, "NOSUCH"), ({"DEV": "CPU", "CC": "no-such-compiler"}, "clang")):
    env["CACHEDB"] = str(tmp_path/"cache.db")
    r = subprocess.run([sys.executable, str(ROOT/"train.py"), "--out", str(tmp_path/"r")],
                       capture_output=True, text=True, env={**os.environ, **env, "XDG_CACHE_HOME": str(tmp_path)})
    assert r.returncode and says in r.stderr.splitlines()[-1] and "Traceback" not in r.stderr, r.stderr

@pytest.fixture
def start():
  """start(out, *flags): train.py as a program of its own, which may be stopped."""
  programs = []
  def begin(out, *flags, **env):
    command = [sys.executable, str(ROOT/"train.py"), *SMALL, "--out", str(out), *map(str, flags)]
    programs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                                     env={**os.environ, **env}))
    return programs[-1]
  yield begin
  for p in programs:
    if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
    p.wait()

def wait_for_lines(process, out, n):
  """Until the log has more than n lines, or the program has ended."""
  log = out/"log.jsonl"
  while process.poll() is None and not (log.exists() and log.read_text().count("\n") > n): time.sleep(0.002)

def saved_step(out): return json.loads(read_tensors(out/"last.safetensors")[1]["ddpm"])["step"]

def test_killed_and_interrupted_runs_end_with_the_same_bytes(tmp_path, start):
  stopped = tmp_path/"stopped"
  run(tmp_path/"whole", "--steps", 12, "--save-every", 2)
  for lines, how in ((1, signal.SIGKILL), (4, signal.SIGINT)):
    p = start(stopped, "--steps", 12, "--save-every", 2)
    wait_for_lines(p, stopped, lines)
    p.send_signal(how)
    says = p.communicate()[1]
    if how == signal.SIGINT:  # Ctrl-C saves the step it is at
      assert p.returncode == 130 and "run the same command again" in says
      assert saved_step(stopped) == len(losses(stopped))
  (stopped/".0123456789abcdef.tmp").write_bytes(b"what a killed run left")
  run(stopped, "--steps", 12, "--save-every", 2)
  assert contents(tmp_path/"whole") == contents(stopped) and losses(tmp_path/"whole") == losses(stopped)

def test_a_run_that_is_told_to_end_saves_and_nobody_else_may_use_its_folder(tmp_path, start):
  p = start(tmp_path, "--steps", 10**6, "--save-every", 10**6)
  wait_for_lines(p, tmp_path, 2)
  for flags in ((), ("--restart",)):
    other = start(tmp_path, "--steps", 10**6, *flags)
    says = other.communicate()[1]
    assert other.returncode == 1 and f"{tmp_path} is in use" in says.splitlines()[-1] and "Traceback" not in says, says
  for _ in "ab": os.killpg(p.pid, signal.SIGTERM)  # as timeout does: twice, and to every process of it
  says = p.communicate()[1]
  assert p.returncode == 143 and "saved: run the same command again" in says, says
  done = saved_step(tmp_path)
  assert done == len(losses(tmp_path)) > 2
  run(tmp_path, "--steps", done + 2)
  steps = [json.loads(line)["step"] for line in (tmp_path/"log.jsonl").read_text().splitlines()]
  assert steps == list(range(1, done + 3))

@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="elsewhere the first step may take minutes")
def test_a_run_that_is_told_to_end_while_it_compiles(tmp_path, start):
  """The processes that compile get the signal as well."""
  p, out = start(tmp_path/"run", "--steps", 10**6, CACHEDB=str(tmp_path/"cache.db")), tmp_path/"run"  # nothing is kept
  def compiles():
    there = subprocess.check_output(["ps", "-axww", "-o", "ppid=", "-o", "args="], text=True).splitlines()
    return any(line.split()[0] == str(p.pid) and "spawn_main" in line for line in there)
  while p.poll() is None and not compiles() and not (out.exists() and losses(out)): time.sleep(0.1)
  time.sleep(1)
  os.killpg(p.pid, signal.SIGTERM)
  says = p.communicate(timeout=500)[1]
  assert p.returncode == 143 and saved_step(out) == len(losses(out)), says

def test_a_run_of_an_older_program_goes_on(tmp_path):
  """It knew no flag that came later; such a flag was off."""
  run(tmp_path/"a", "--steps", 4, "--anneal", 0)
  run(tmp_path/"b", "--steps", 2, "--anneal", 0)
  tensors, metadata = read_tensors(tmp_path/"b"/"last.safetensors")
  meta = json.loads(metadata["ddpm"])
  for young in ("times", "min_snr", "dequantize", "clip_x0", "drop_labels", "init", "anneal"): del meta["train"][young]
  meta["train"]["network"]["fourier"] = []  # and a flag that is no more
  write_tensors(tmp_path/"b"/"last.safetensors", tensors, meta)
  with pytest.raises(ValueError, match="anneal = 0, not 5"): run(tmp_path/"b", "--steps", 4, "--anneal", 5)
  run(tmp_path/"b", "--steps", 4)
  assert contents(tmp_path/"a") == contents(tmp_path/"b") and losses(tmp_path/"a") == losses(tmp_path/"b")

def test_time_left_counts_hours_beyond_a_day(tmp_path, monkeypatch, capsys):
  ticks = iter(range(0, 10**9, 100_000))  # between two looks at the clock there are 100,000 s
  monkeypatch.setattr(train, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: next(ticks)}))
  run(tmp_path, "--steps", 4)
  left = {int(n): (int(h), m, s) for n, h, m, s in
          re.findall(r"step +(\d)/4 .* (\d+):(\d\d):(\d\d) left", capsys.readouterr().err)}
  assert left[4] == (0, "00", "00") and left[3][0] >= 27 and left[2][0] == 2 * left[3][0] + 1
  assert left[3][0] * 3600 + int(left[3][1]) * 60 + int(left[3][2]) == 100_000

# *** the log ***

def write_log(path, steps):
  with open(path, "w") as f:
    for n in steps:
      entry = {"step": n, "loss": 1/n, "smooth": 2/n, "grad_norm": 1., "lr": 1e-3, "bands": [1.]*4, "images_per_s": 9.9}
      f.write(json.dumps(entry) + "\n")

def test_what_is_kept_of_the_log_is_bounded_and_depends_on_the_steps_alone(tmp_path):
  whole, path = [], tmp_path/"log.jsonl"
  for n in range(1, 40_001):
    train.add_point(whole, (n, 1/n, 2/n))
    assert len(whole) <= 2000 and (n > 2000 or len(whole) == n)
    if n in (1999, 2001, 7_000, 16_001, 40_000):  # the same as a run that goes on from here has it
      write_log(path, range(1, n + 6))
      before = path.read_text()
      assert train.cut_log(path, n) == whole
      assert path.read_text() == "".join(before.splitlines(keepends=True)[:n])
  at = np.array([n for n, *_ in whole])
  assert at[0] == 1 and len(at) > 1000 and len(set(np.diff(at))) == 1 and 40_000 - at[-1] < np.diff(at)[0]
  assert whole[5][1:] == (1/at[5], 2/at[5])

def test_a_long_log_is_not_read_into_memory(tmp_path):
  write_log(tmp_path/"log.jsonl", range(1, 50_001))
  tracemalloc.start()
  try:
    train.cut_log(tmp_path/"log.jsonl", 49_999)
    assert tracemalloc.get_traced_memory()[1] < 2e6 < (tmp_path/"log.jsonl").stat().st_size
  finally: tracemalloc.stop()

@pytest.mark.parametrize("damage", ["", "no json\n", '{"step": 3}\n', '{"step": null}\n', "[]\n", "\0\xff\n"])
def test_a_damaged_log_ends_where_the_damage_is(tmp_path, damage):
  path = tmp_path/"log.jsonl"
  write_log(path, (1, 2))
  good = path.read_text()
  path.write_bytes((good + damage).encode("latin-1"))
  assert train.cut_log(path, 9) == [(1, 1.0, 2.0), (2, 0.5, 1.0)] and path.read_text() == good
  path.unlink()
  assert train.cut_log(path, 9) == [] and path.read_text() == ""

# *** images of a folder ***

def folder(path, side, n=3):
  path.mkdir()
  for i in range(n): Image.fromarray(rng(i).integers(0, 256, (side, side, 3), np.uint8)).save(path/f"{i}.png")
  return str(path)

class Enough(Exception): pass

@pytest.mark.parametrize("side,flags,size", [
  (50, [], 48), (512, [], 64), (50, ["--channel-mult", "1,2"], 50), (512, ["--image-size", "128"], 128)])
def test_size_of_the_images_of_a_folder(tmp_path, monkeypatch, side, flags, size):
  def state(config, *_):
    assert config["image_size"] == size
    raise Enough
  monkeypatch.setattr(train, "State", state)
  with pytest.raises(Enough): train.main(["--dataset", folder(tmp_path/"pictures", side), *flags])

def test_a_folder_is_trained_on_at_the_size_that_is_said(tmp_path, capsys):
  pictures = folder(tmp_path/"pictures", 13)
  run(tmp_path/"run", "--dataset", pictures, "--image-size", 8, "--steps", 1)
  assert "3 images of 3x8x8" in capsys.readouterr().err
  assert checkpoint.load(tmp_path/"run"/"ema.safetensors")[0].config["image_size"] == 8
  with pytest.raises(ValueError, match="image_size|images"):
    run(tmp_path/"run", "--dataset", pictures, "--image-size", 12, "--steps", 2)
  with pytest.raises(ValueError, match="50x50.*multiple of 4"):
    run(tmp_path/"other", "--dataset", pictures, "--image-size", 50, "--channel-mult", "1,1,1")
  with pytest.raises(ValueError, match="size.*glyphs"): run(tmp_path/"other", "--image-size", 8)

# *** the rest ***

def test_memory_does_not_grow():
  used = [seen[-1] for seen in step_once(steps=20)]
  assert len(set(used[3:])) == 1

@pytest.mark.parametrize("predict,loss,sigma", [("mu", "vlb", "beta"), ("x0", "simple", "beta_tilde")])
def test_other_rows_of_table_2_and_labels(tmp_path, predict, loss, sigma):
  run(tmp_path, "--steps", 1, "--predict", predict, "--loss", loss, "--sigma", sigma, "--class-conditional",
      "--beta-1", 1e-3, "--beta-T", 0.3)
  model, meta = checkpoint.load(tmp_path/"ema.safetensors")
  assert (meta["ddpm"] == {"T": 50, "beta_1": 1e-3, "beta_T": 0.3, "schedule": "linear", "sigma": sigma,
                           "predict": predict} and model.config["num_classes"] == 10)

def test_a_run_can_begin_with_the_weights_of_another(tmp_path):
  run(tmp_path/"a", "--steps", 3)
  before = read_tensors(tmp_path/"a"/"ema.safetensors")[0]
  run(tmp_path/"b", "--steps", 1, "--lr", 1e-9, "--init", tmp_path/"a")
  raw = read_tensors(tmp_path/"b"/"last.safetensors")[0]
  for k, v in before.items():
    for key in ("raw", "ema"): close(raw[f"{key}.{k}"], v, atol=1e-6)
  with pytest.raises(ValueError, match="--init.*another network"):
    run(tmp_path/"c", "--steps", 1, "--channels", 16, "--init", tmp_path/"a")

def test_flips_know_nothing_of_the_times():
  """Image i was once flipped at step n + 1 if and only if t of image 2i + 1 at step n was at most T/2."""
  images = np.tile(np.arange(8, dtype=np.uint8), (256, 1, 1, 1))
  a = argparse.Namespace(T=1000, batch=256, seed=3, flip=True, times="uniform", dequantize=False, drop_labels=0.0,
                         accum=1)
  drawn = [train.draw(a, images, np.zeros(256, np.int32), 0, n)[:2] for n in range(1, 61)]
  agree = [(x[:128, 0, 0, 0] > 0) == (t[1::2] <= 500) for (_, t), (x, _) in zip(drawn, drawn[1:])]
  assert 0.45 < np.mean(agree) < 0.55  # of 59 x 128; its deviation is 0.006
