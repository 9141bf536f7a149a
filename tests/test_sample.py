# ***** sample.py *****

T, MODE, SD = 200, 0.6, 0.1
at = lambda t, n: Tensor(np.full(n, t, np.int32)).realize()
short = lambda T=T, **kwargs: DDPM(T, 0.1 / T, min(0.7, 20 / T), **kwargs)  # the paper's schedule with fewer steps

def exact(d, mode=MODE, sd=SD):
  """The exact eps of data that are ±mode in every pixel, with noise sd: -√(1-ᾱ) times the score of their mixture."""
  ab = f32(d.alpha_bar)
  def model(x, t):
    a = column(ab[t], x)
    var, m = a * sd**2 + 1 - a, a.sqrt() * mode
    return (1 - a).sqrt() * (x - m * (x * m / var).tanh()) / var
  return model

def last(iterator):
  *_, (t, x, x0_hat) = iterator
  assert t == 0
  return x.numpy()

def everywhere(f):  # the samplers with all that they do: ddim with and without noise
  return pytest.mark.parametrize("name, options", [("ddpm", {}), ("ddim", {}), ("ddim", {"eta": 1.0}), ("sde", {}),
                                                   ("pc", {}), ("ode", {}), ("langevin", {"inner": 2})])(f)

# *** times and noise ***

@pytest.mark.parametrize("spacing", ("linear", "quadratic"))
def test_timesteps_run_from_T_to_0(spacing):
  for T in (1, 2, 3, 50, 1000):
    for steps in range(1, T + 1) if T < 1000 else (1, 2, 10, 31, 32, 33, 500, 999, 1000):
      times = timesteps(T, steps, spacing)
      assert len(times) == steps + 1 and times[0] == T and times[-1] == 0 and (np.diff(times) < 0).all()
  assert timesteps(1000, 4, spacing) == ([1000, 750, 500, 250, 0] if spacing == "linear" else [1000, 562, 250, 62, 0])

def test_wrong_times_are_refused():
  d, x = short(10), f32(np.zeros((2, 1, 1, 1)))
  for steps in (0, -1, 11, [11, 5, 0], [5], [5, 5, 0], [0, 5], [5, -1], []):
    with pytest.raises(ValueError): SAMPLERS["ddpm"](d, None, x, steps)  # at once, not in the first step
  with pytest.raises(ValueError): timesteps(10, 5, "cubic")
  with pytest.raises(ValueError): SAMPLERS["ddpm"](d, None, x, 5, seed=-1)
  with pytest.raises(ValueError): SAMPLERS["ddpm"](d, None, x, 5, first=[1, 2, 3])
  for eta in (-0.1, 1.1, math.nan):
    with pytest.raises(ValueError): SAMPLERS["ddim"](d, None, x, 5, eta=eta)

def test_noise_is_independent_of_x_T_of_other_steps_and_of_other_images():
  d, n, shape = short(10, predict="x0"), 400, (1, 8, 8)
  ratio = d.beta_tilde[1:] / d.beta[1:]
  x_T = draw_x_T(n, shape, 7)
  xs = [x_T.numpy()] + [x.numpy() for _, x, _ in SAMPLERS["ddpm"](d, lambda x, t: x * 0 + column(t, x) * 0, x_T, 10, 7)]
  z = [(x_s - math.sqrt(d.alpha[t]) * ratio[t - 1] * x_t) / math.sqrt(d.beta[t])  # Algorithm 2 with x̂_0 = 0, for z
       for t, x_t, x_s in zip(range(10, 1, -1), xs, xs[1:])]
  draws = [xs[0], *z[:3], np.roll(z[0], 1, 0), np.roll(xs[0], 1, 0), draw_x_T(n, shape, 8).numpy(),
           normals(generators(7, 3, range(n)), shape)]
  corr = np.corrcoef([a.ravel() for a in draws])
  assert np.abs(corr - np.eye(len(draws))).max() < 5 / math.sqrt(n * 64)
  for a in draws: assert abs(a.mean()) < 5 / math.sqrt(n * 64) and abs(a.std() - 1) < 5 / math.sqrt(2 * n * 64)

@everywhere
def test_image_i_is_the_same_bytes_in_any_batch(name, options):
  d, jits = short(12), {}
  run = lambda x, seed=3, **kw: last(SAMPLERS[name](d, model, x, 6, seed=seed, jits=jits, **kw, **options)).tobytes()
  model, x_T = exact(d), draw_x_T(8, (2, 3, 3), 3)
  assert draw_x_T(5, (2, 3, 3), 3, first=3).numpy().tobytes() == x_T.numpy()[3:].tobytes()
  whole = run(x_T)
  assert run(x_T[:3]) + run(x_T[3:], first=3) == whole == run(x_T.numpy())
  assert run(x_T[:3], first=np.arange(3)) == run(x_T[:3])
  if name != "ode" and (name, options) != ("ddim", {}):
    assert run(x_T, first=1) != whole
    assert run(x_T, seed=4) != whole

# *** what holds for every sampler ***

@everywhere
def test_data_are_recovered(name, options):
  d = short(sigma="beta_tilde")
  steps = T // 4 if name == "langevin" else T                # five evaluations each
  x = last(SAMPLERS[name](d, exact(d), draw_x_T(1024, (1, 2, 4), 0), steps,
                          **({} if options == {"inner": 2} else options))).ravel()
  off = np.abs(x) - MODE
  assert abs(x.mean()) < 5 * x.std() / math.sqrt(len(x))
  assert abs((x > 0).mean() - 0.5) < 5 * 0.5 / math.sqrt(len(x))
  assert np.abs(x).mean() == pytest.approx(MODE, abs=0.007)
  assert x.std() == pytest.approx(math.sqrt(MODE**2 + SD**2), rel=0.015)
  assert off.std() == pytest.approx(SD, rel=0.25 if name == "langevin" else 0.13)
  assert (np.abs(off) > 4 * SD).mean() < 0.003

@pytest.mark.parametrize("host", (False, True))
@everywhere
def test_every_number_of_steps_starts_at_T_and_lands_on_x0(name, options, host):
  T = 3 if host else 6
  d, x_T, seen, jits = short(T, predict="x0"), draw_x_T(2, (1, 2, 2), 0), [], {}
  def model(x, t):  # x̂_0 tells the time at which it was asked
    seen.append(t)
    return (Tensor(t.numpy().reshape(-1, 1, 1, 1) / np.ones(x.shape, np.float32) / T) if host
            else x * 0 + column(t, x) / T)
  for steps in range(1, T + 1):
    out = list(SAMPLERS[name](d, model, x_T, steps, jits=jits, **options))
    times = timesteps(T, steps)
    assert [t for t, _, _ in out] == times[1:]
    for t, (_, x, x0_hat) in zip(times, out): close(x0_hat.numpy(), t / T, rtol=1e-6)
    assert all(x.shape == x_T.shape and np.isfinite(x.numpy()).all() for _, x, _ in out)
    close(out[-1][1].numpy(), times[-2] / T, rtol=2e-6)      # ᾱ = 1: x_0 is x̂_0, without noise
  assert all(t.shape == (2,) and t.dtype.name == "int" for t in seen)

@everywhere
def test_what_was_given_stays_as_it_was(name, options):
  d, x_T = short(9), draw_x_T(3, (1, 2, 2), 0)
  before, model = x_T.numpy().copy(), exact(d)
  run = lambda: SAMPLERS[name](d, model, x_T, 9, **options)
  kept = [(x.numpy().copy(), x0_hat.numpy().copy()) for _, x, x0_hat in run()]
  for (x, x0_hat), (_, x_late, x0_late) in zip(kept, list(run())):
    assert (x == x_late.numpy()).all() and (x0_hat == x0_late.numpy()).all()
  assert (x_T.numpy() == before).all()

@pytest.mark.parametrize("name", ("ddpm", "ddim", "pc"))
def test_a_model_may_leave_the_device_and_may_predict_anything(name):
  x_T, eps_model, n = draw_x_T(4, (1, 2, 2), 0), exact(short(4)), 4
  d = {p: short(n, predict=p) for p in ("eps", "x0", "mu")}
  def x0(x, t): return d["eps"].predict_x0(x, t, eps_model(x, t))
  def mu(x, t): return d["eps"].q_posterior(x0(x, t), x, t, t - 1)[0]
  def host(x, t): return Tensor(eps_model(f32(x.numpy()), Tensor(t.numpy())).numpy())
  def half_host(x, t): return x * float(t.numpy()[0]) / n     # a jit would keep the first t for ever
  run = lambda d, model: last(SAMPLERS[name](d, model, x_T, n))
  ours = run(d["eps"], eps_model)
  for other in (run(d["eps"], host), run(d["x0"], x0), run(d["mu"], mu)): close(ours, other, atol=3e-5)
  close(run(d["eps"], half_host), run(d["eps"], lambda x, t: x * column(t, x) / n), atol=1e-6)

@everywhere
def test_clipping_is_a_switch(name, options):
  d, x_T = short(8), draw_x_T(4, (1, 4, 4), 0)
  for clip in (True, False):
    out = [x0_hat.numpy() for _, _, x0_hat in SAMPLERS[name](d, exact(d, 3.0), x_T, 8, clip=clip, **options)]
    assert (np.abs(out).max() <= 1) == clip and (np.abs(out[-1]).max() > 2) != clip

def test_the_compiled_step_is_kept_for_the_next_call_and_reads_new_labels():
  d, jits, y = short(8, predict="x0"), {}, at(1, 2)
  calls = []
  def net(x, t, y): return calls.append(0) or x * 0 + column(t, x) * 0 + column(y, x) / 4
  model, x_T = guided(net, y, 1, 3), draw_x_T(2, (1, 1, 1), 0)
  close(last(SAMPLERS["ddpm"](d, model, x_T, 8, jits=jits)), 0.25)
  n = len(calls)
  y.assign(at(2, 2)).realize()
  close(last(SAMPLERS["ddpm"](d, model, x_T, 4, jits=jits)), 0.5)
  assert len(calls) == n and len(jits) == 1

# *** each against its equation ***

def chain(d, x, times, seed, step):
  """Algorithm 2 in float64: step(x_t, t, s, z), with the noise that image i draws in its own order."""
  rngs = [np.random.default_rng([seed, 0x5A, 2, i]) for i in range(len(x))]
  x = x.numpy().astype(np.float64)
  for t, s in zip(times, times[1:]):
    z = np.stack([r.standard_normal(x.shape[1:], np.float32) for r in rngs]) if s else 0.0
    x = step(x, t, s, z)
  return x

def eps64(d, x, t, mode=MODE, sd=SD):
  a = d.alpha_bar[t]
  var, m = a * sd**2 + 1 - a, math.sqrt(a) * mode
  return math.sqrt(1 - a) * (x - m * np.tanh(x * m / var)) / var

@pytest.mark.parametrize("sigma", ("beta", "beta_tilde"))
def test_ddpm_is_algorithm_2(sigma):
  d = short(20, sigma=sigma)
  def step(x, t, s, z):
    a, var = d.alpha[t], d.beta[t] if sigma == "beta" else d.beta_tilde[t]
    return (x - d.beta[t] / math.sqrt(1 - d.alpha_bar[t]) * eps64(d, x, t)) / math.sqrt(a) + math.sqrt(var) * z
  x_T = draw_x_T(50, (1, 2, 2), 5)
  close(last(SAMPLERS["ddpm"](d, exact(d), x_T, 20, 5, clip=False)), chain(d, x_T, range(20, -1, -1), 5, step),
        atol=2e-5)

@pytest.mark.parametrize("steps", (20, 7))
@pytest.mark.parametrize("clip", (True, False))
def test_ddim_with_eta_1_is_algorithm_2(steps, clip):
  d = short(20, sigma="beta_tilde")
  x_T, model = draw_x_T(50, (1, 2, 2), 0), exact(d, 1.2)
  both = [SAMPLERS[name](d, model, x_T, steps, clip=clip, **o) for name, o in (("ddpm", {}), ("ddim", {"eta": 1}))]
  for (t, x, x0), (_, y, y0) in zip(*both, strict=True):
    close(x.numpy(), y.numpy(), atol=3e-5)
    close(x0.numpy(), y0.numpy(), atol=3e-5)

@pytest.mark.parametrize("eta", (0.0, 0.3, 1.0))
def test_ddim_step_is_eq_12(eta):
  d, rng = DDPM(), np.random.default_rng(0)
  for t, s in ((1000, 999), (1000, 1), (1000, 0), (500, 20), (2, 1), (2, 0), (1, 0)):
    x0, eps, z = rng.standard_normal((3, 4, 1, 2, 2))
    a, a_s = d.alpha_bar[t], d.alpha_bar[s]
    x_t = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
    sigma = eta * math.sqrt((1 - a_s) / (1 - a)) * math.sqrt(1 - a / a_s)        # Eq. 16
    x_s = math.sqrt(a_s) * x0 + math.sqrt(max(0, 1 - a_s - sigma**2)) * eps + sigma * z
    ours = ddim_step(d, f32(eps), f32(x_t), t, s, eta, f32(z))
    close(ours.numpy(), x_s, atol=5e-5 if t == 1000 else 2e-6)                    # x̂_0 at T: 1e-7 / √ᾱ_T
    close(ours.numpy(), ddim_step(d, f32(eps), f32(x_t), at(t, 4), at(s, 4), eta, f32(z)).numpy(), atol=1e-7)
    if s == 0: close(ours.numpy(), x0, atol=5e-5)
    if eta == 0 and s: close(ddim_step(d, f32(eps), f32(x_s), s, t).numpy(), x_t, atol=5e-6)
  with pytest.raises(ValueError): ddim_step(d, f32(eps), f32(x_t), 2, 1, 0.5)

def test_ddim_decodes_what_it_encoded():
  d, rng = short(100), np.random.default_rng(0)
  x0 = rng.choice((-MODE, MODE), (200, 1, 1, 2)) + 0.3 * rng.standard_normal((200, 1, 1, 2))
  model, errors = exact(d, MODE, 0.3), []
  for iterations in (1, 2, 6):
    x_T = ddim_encode(d, model, f32(x0), 100, iterations=iterations)
    assert 0.9 < x_T.numpy().std() < 1.2
    errors.append(np.abs(last(SAMPLERS["ddim"](d, model, x_T, 100, clip=False)) - x0).max())
  assert 1e-3 < errors[0] < 0.1 and errors[1] < 0.01 and errors[2] < 1e-4

def test_ode_is_of_second_order_and_ddim_of_first():
  """For data N(0, 0.5²) the flow scales x with the standard deviation of q(x_t). The step to 0 is left out: Euler's."""
  d, x_T, end = short(400), draw_x_T(8, (1, 2, 2), 1), 40
  sd = lambda t: math.sqrt(d.alpha_bar[t] * 0.5**2 + 1 - d.alpha_bar[t])
  def error(name, steps):
    *_, (_, x, _) = SAMPLERS[name](d, exact(d, 0.0, 0.5), x_T, np.linspace(400, end, steps + 1).astype(int), clip=False)
    return np.abs(x.numpy() - x_T.numpy() * sd(end) / sd(400)).max()
  ode, ddim = [[error(name, steps) for steps in (20, 40)] for name in ("ode", "ddim")]
  assert 3.2 < ode[0] / ode[1] < 5 and 1.8 < ddim[0] / ddim[1] < 2.3 and ddim[1] > 5 * ode[1]

def test_sde_is_eq_6_and_pc_adds_langevin():
  d = short(20)
  def reverse(x, t, s, z):
    b, score = math.log(d.alpha_bar[s] / d.alpha_bar[t]), -eps64(d, x, t) / math.sqrt(1 - d.alpha_bar[t])
    if s == 0: return (x + (1 - d.alpha_bar[t]) * score) / math.sqrt(d.alpha_bar[t])   # Tweedie: x̂_0
    return x + b * (x / 2 + score) + math.sqrt(b) * z
  def langevin(x, t, step, z):
    return x - step * eps64(d, x, t) / math.sqrt(1 - d.alpha_bar[t]) + math.sqrt(2 * step) * z
  def pc(x, t, s, z):
    return langevin(x, t, 2 * d.alpha[t] * 0.1**2 * (1 - d.alpha_bar[t]), z) if s == t else reverse(x, t, s, z)
  def ald(x, t, s, z): return langevin(x, t, 0.3 * (1 - d.alpha_bar[t]), z) if s else reverse(x, t, s, z)
  x_T, times, twice = draw_x_T(50, (1, 2, 2), 5), [20, 13, 5, 0], [20, 20, 13, 13, 5, 5, 0]
  for name, options, path, step in (("sde", {}, times, reverse), ("pc", {"snr": 0.1}, twice, pc),
                                    ("langevin", {"inner": 2, "r": 0.3}, twice, ald)):
    close(last(SAMPLERS[name](d, exact(d), x_T, times, 5, clip=False, **options)), chain(d, x_T, path, 5, step),
          atol=3e-5)

def test_training_eps_is_denoising_score_matching():
  """Vincent 2011: E‖s(x_t) + ε/√(1−ᾱ)‖² − E‖s(x_t) − ∇log q(x_t)‖² is the same for every s. Eq. 14 is the first, times
  1−ᾱ; so the best ε_θ is −√(1−ᾱ) ∇log q(x_t), the exact model of these tests."""
  d, t, n = short(), 40, 400
  a = d.alpha_bar[t]
  u = (np.arange(n) + 0.5) / n
  grid = np.linspace(-7, 7, 20001)
  cdf = np.cumsum(np.exp(-grid**2 / 2))
  normal = np.interp(u, cdf / cdf[-1], grid)                  # n equally likely values of N(0, 1)
  x0 = np.concatenate([MODE + 0.3 * normal[::2], -MODE + 0.3 * normal[1::2]])
  x0, eps = [v.reshape(-1, 1, 1, 1) for v in np.meshgrid(x0, normal)]
  x_t = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
  def log_q(x):
    var, m = a * 0.3**2 + 1 - a, math.sqrt(a) * MODE
    return np.logaddexp(-(x - m)**2 / 2 / var, -(x + m)**2 / 2 / var)
  truth = (log_q(x_t + 1e-5) - log_q(x_t - 1e-5)) / 2e-5
  time, ours = at(t, n * n), exact(d, MODE, 0.3)
  close(d.score(ours, f32(x_t), time).numpy(), truth, atol=2e-4)  # the tests' model is the gradient of a density
  gaps, losses = [], []
  for model in (ours, lambda x, t: x * 0.8, lambda x, t: (x * 2).sin(), lambda x, t: x * 0 + 0.5):
    losses.append(d.loss_simple(model, f32(x0), time, f32(eps)).item() / (1 - a))
    gaps.append(losses[-1] - ((d.score(model, f32(x_t), time).numpy() - truth)**2).mean())
  assert min(losses[1:]) > losses[0] + 0.05
  close(gaps, gaps[0], rtol=1e-2)

def test_guidance_0_and_1_are_identities():
  rng, calls = np.random.default_rng(0), []
  x, t, y = f32(rng.standard_normal((4, 1, 2, 2))), at(5, 4), Tensor(np.array([0, 1, 2, 1], np.int32))
  def net(x, t, y): return calls.append(x.shape[0]) or x * (column(y, x) + 1) + column(t, x) + column(y, x).sin()
  labelled, free = net(x, t, y).numpy(), net(x, t, at(3, 4)).numpy()
  assert (guided(net, y, 1, 3)(x, t).numpy() == labelled).all() and (guided(net, y, 0, 3)(x, t).numpy() == free).all()
  assert calls == [4] * 4                                     # one evaluation, not two
  close(guided(net, y, 3.5, 3)(x, t).numpy(), 3.5 * labelled - 2.5 * free, rtol=1e-5)

# *** the command ***

@pytest.fixture
def command(monkeypatch, tmp_path):
  """sample.main in an empty folder, with the exact model for a network: classes 0 and 1 are its two modes."""
  meta = {"ddpm": dict(T=12, beta_1=0.1 / 12, beta_T=0.9), "dataset": "glyphs"}
  class Net:
    config = {"in_channels": 1, "image_size": 16, "num_classes": 2}
    def __call__(self, x, t, y=None):
      d = DDPM(**meta["ddpm"])
      a = column(f32(d.alpha_bar)[t], x)
      var, m = a * SD**2 + 1 - a, a.sqrt() * MODE
      side = ((x * m / var).tanh() if y is None
              else (column(y, x) == 2).where((x * m / var).tanh(), column(y, x) * 2. - 1))
      return (1 - a).sqrt() * (x - m * side) / var
  loaded = []
  monkeypatch.setattr(sample.unet, "load", lambda path, raw=False: loaded.append((path, raw)) or (Net(), meta))
  monkeypatch.chdir(tmp_path)
  def run(line): sample.main(["--checkpoint", "model", *line.split()])
  run.loaded, run.net, run.meta = loaded, Net, meta
  return run

def read(path): return np.load(path)["arr_0"]

def test_the_files(command):
  command("--n 5 --npz a.npz --gif a.gif --out pictures/a.png")
  a = read("a.npz")
  assert a.shape == (5, 16, 16, 1) and a.dtype == np.uint8
  assert np.asarray(Image.open("pictures/a.png")).tolist() == np.asarray(data.grid(a.transpose(0, 3, 1, 2))).tolist()
  gif = Image.open("a.gif")
  assert gif.n_frames == 13
  gif.seek(12)
  close(np.asarray(gif.convert("L"), int), np.asarray(Image.open("pictures/a.png"), int), atol=3)
  ddpm, x_T = DDPM(**command.meta["ddpm"]), draw_x_T(5, (1, 16, 16), 0)
  command("--n 5 --npz b.npz --guidance 0")
  direct = last(SAMPLERS["ddpm"](ddpm, guided(command.net(), at(2, 5), 1, 2), x_T, 12))
  assert (data.to_uint8(direct).transpose(0, 2, 3, 1) == read("b.npz")).all()
  kinds = (a > 127).reshape(5, -1)[:, 0]                     # without a class each image has one of its own
  assert ((a > 127).reshape(5, -1) == kinds[:, None]).all()
  direct = last(SAMPLERS["ddpm"](ddpm, guided(command.net(), Tensor(kinds.astype(np.int32)), 1, 2), x_T, 12))
  assert (data.to_uint8(direct).transpose(0, 2, 3, 1) == a).all()

def test_batch_and_n_change_no_image(command):
  for i, line in enumerate(("--n 7", "--n 7 --batch 3", "--n 4")): command(f"{line} --seed 5 --steps 6 --npz {i}.npz")
  a, b, c = map(read, ("0.npz", "1.npz", "2.npz"))
  assert a.tobytes() == b.tobytes() and a[:4].tobytes() == c.tobytes() and len({v.tobytes() for v in a}) == 7

def test_classes(command):
  command("--classes --n 3 --batch 4 --npz a.npz")
  assert [v.mean() > 127 for v in read("a.npz")] == [False] * 3 + [True] * 3
  for label in (0, 1):
    command(f"--class {label} --n 2 --npz a.npz --guidance 2")
    assert ((read("a.npz") > 127) == label).all()
  command("--n 2 --npz a.npz --guidance 0")                  # by the null label: both modes
  assert 0.3 < (read("a.npz") > 127).mean() < 0.7
  command("--n 61 --npz a.npz")                              # without a class: unmixed, both among two, in any order
  share = (read("a.npz") > 127).mean((1, 2, 3))
  assert (abs(share - 0.5) > 0.45).all()
  pairs = (share[:60] > 0.5).reshape(30, 2)
  assert (pairs.sum(1) == 1).all() and 5 < pairs[:, 0].sum() < 25

def test_the_figures(command, monkeypatch):
  kept = []
  monkeypatch.setattr(sample.data, "save_png", lambda path, img: kept.append(img))
  grids = []
  grid = data.grid
  monkeypatch.setattr(sample.data, "grid",
                      lambda images, ncols=None: grids.append((images, ncols)) or grid(images, ncols))
  command("--progressive --n 2 --guidance 0")
  images, ncols = grids[-1]
  assert images.shape == (20, 1, 16, 16) and ncols == 10
  edge = np.abs(images.astype(float) - 127.5).mean((1, 2, 3)).reshape(2, 10)
  assert (edge[:, -1] > edge[:, 0] + 20).all()               # x̂_0 is grey at T and black and white at 0
  command("--shared 3 --n 2")
  images, ncols = grids[-1]
  assert images.shape == (2 * 4 * 4, 1, 16, 16) and ncols == 4
  assert len({v.tobytes() for v in images}) == len(images)
  signs = (images.reshape(2, 4, 4, 256) > 127).astype(float)
  same = [(signs[:, row, 1] == signs[:, row, 2]).mean() for row in range(4)]
  assert same[0] < 0.6 and same[3] > 0.7                     # from x_T they share nothing, from x_{T/4} most modes
  assert (signs[:, 3, 0] == signs[:, 3, 1]).mean() > 0.75    # and the first image of a row is their latent
  command("--interpolate 1 --n 2")
  images, ncols = grids[-1]
  assert images.shape == (26, 1, 16, 16) and ncols == 13
  glyphs = {v.tobytes() for v in data.load("glyphs", "test")[0]}
  assert [v.tobytes() in glyphs for v in images] == ([True] + [False] * 11 + [True]) * 2
  command("--interpolate 12 --n 1 --sampler ode")
  assert grids[-1][0].shape == (13, 1, 16, 16)
  with pytest.raises(ValueError, match="from 1 to T = 12"): command("--interpolate 13")
  with pytest.raises(ValueError, match="unknown dataset"): command("--interpolate 3 --dataset nothing")

def test_interpolation_mixes_latents_of_one_noise(command):
  d, images = DDPM(**command.meta["ddpm"]), data.load("glyphs", "test")[0][:4]
  def draw(x, times, keep=(0,), index=None):                  # a decoder that does nothing
    assert times == [7, 4, 0] and (index == np.repeat([0, 1], 11)).all()
    return {0: (x, None)}
  rows, ncols = sample.interpolate(draw, d, images, 7, [12, 8, 7, 4, 0], 3)
  rows, x0 = rows.reshape(2, 13, 256), images.reshape(2, 2, 256) / 127.5 - 1
  close(rows[:, [0, 12]], x0, atol=1e-6)
  close(rows[:, 1:12], rows[:, [1]] + np.linspace(0, 1, 11)[:, None] * (rows[:, [11]] - rows[:, [1]]), atol=1e-5)
  eps = (rows[:, [1, 11]] - math.sqrt(d.alpha_bar[7]) * x0) / math.sqrt(1 - d.alpha_bar[7])
  assert abs(eps.std() - 1) < 0.1 and np.abs(np.corrcoef(eps.reshape(4, 256)) - np.eye(4)).max() < 0.3

def test_raw_weights_and_the_newest_run(command, monkeypatch, tmp_path):
  with pytest.raises(ValueError, match="no runs"): unet.find_checkpoint(None, True)
  for i, name in enumerate(("old", "new")):
    for file in ("ema", "last"):
      (path := tmp_path / "runs" / name / f"{file}.safetensors").parent.mkdir(parents=True, exist_ok=True)
      path.touch()
      sample.os.utime(path, (i, i))
  assert unet.find_checkpoint(None, False) == "runs/new/ema.safetensors"
  assert unet.find_checkpoint(None, True) == "runs/new/last.safetensors"
  assert unet.find_checkpoint("runs/old", True) == "runs/old/last.safetensors"
  assert unet.find_checkpoint("owner/name", False) == "owner/name"
  command("--n 1 --raw --steps 2")
  assert command.loaded[-1] == ("model", True)

@pytest.mark.parametrize("line", ("--n 0", "--n x", "--steps 0", "--seed -1", "--batch 0", "--eta 0.5", "--guidance -1",
  "--sampler ddim --eta 1.5", "--sampler nothing", "--class 0 --guidance nan", "--class 0 --classes",
  "--shared 2 --sampler ode", "--shared 2 --gif a.gif", "--classes --progressive", "--out /",
  "--npz /proc/version/a.npz", "--dataset mnist", "--unknown"))
def test_wrong_arguments_are_one_sentence(command, line):
  with pytest.raises(SystemExit) as e: command(line)
  assert str(e.value).startswith("sample.py: ") and "\n" not in str(e.value) and not command.loaded

def test_wrong_for_this_model(command, monkeypatch):
  for line in ("--steps 13", "--class 2"):
    with pytest.raises(ValueError, match="must be from"): command(line)
  command.net.config = {**command.net.config, "num_classes": 0}
  for line in ("--class 0", "--classes", "--guidance 2"):
    with pytest.raises(ValueError, match="without classes"): command(line)
  command("--n 1 --steps 2 --npz a.npz")
  assert read("a.npz").shape == (1, 16, 16, 1)

def test_docstrings_name_what_they_compute():
  for f, number in ((SAMPLERS["ddpm"], "Algorithm 2"), (ddim_step, "Eq. 12"), (SAMPLERS["ddim"], "Eq. 12"),
                    (SAMPLERS["sde"], "Eq. 6"), (SAMPLERS["pc"], "Algorithms 3 and 5"), (SAMPLERS["ode"], "Eq. 13"),
                    (SAMPLERS["langevin"], "Algorithm 1"), (guided, "Eq. 6"), (sample.progressive, "Figure 6"),
                    (sample.shared, "Figure 7"), (sample.interpolate, "Figure 8")):
    assert number in inspect.getdoc(f).split("\n\n")[0], f

