"""The page of a model: what its kernels compute in a real browser, on a WebGPU in software, beside Python's."""
import contextlib, itertools, json, os, shutil, subprocess, time

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu-sandbox --disable-background-networking --no-first-run --disable-sync
--disable-component-update --enable-unsafe-webgpu --use-webgpu-adapter=swiftshader --enable-features=Vulkan
--remote-debugging-pipe""".split()

@contextlib.contextmanager
def opened(url, folder):
  """Opens the page in Chromium: a function that sends a command of the DevTools protocol, and the events so far."""
  (to_browser, mine), (theirs, from_browser) = os.pipe(), os.pipe()
  def inherited():  # the protocol's two ends are descriptors 3 and 4
    os.dup2(to_browser, 100), os.dup2(from_browser, 101), os.dup2(100, 3), os.dup2(101, 4)
  browser = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"], preexec_fn=inherited,
                             close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  os.close(to_browser), os.close(from_browser)
  numbers, events, answers, session = itertools.count(1), [], open(theirs, "rb"), {}
  def messages():
    text = b""
    while byte := answers.read1(65536):
      *whole, text = (text + byte).split(b"\0")
      yield from map(json.loads, whole)
  said = messages()
  def send(method, **params):
    os.write(mine, json.dumps(dict(id=(n := next(numbers)), method=method, params=params, **session)).encode() + b"\0")
    for message in said:
      if message.get("id") != n: events.append(message)
      elif "error" in message: raise RuntimeError(message["error"])
      else: return message["result"]
    raise RuntimeError("the browser is gone")
  try:
    target = send("Target.createTarget", url="about:blank")["targetId"]
    session["sessionId"] = send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"): send(f"{domain}.enable")
    send("Page.navigate", url=url)
    yield send, events
  finally:
    browser.kill()
    browser.wait()
    answers.close(), os.close(mine)

def value(send, code): return send("Runtime.evaluate", expression=code, awaitPromise=True)["result"].get("value")

def until(send, code, seconds=60):
  """What the page's code is as soon as it is true."""
  ends = time.monotonic() + seconds
  while not (found := value(send, code)):
    assert time.monotonic() < ends, value(send, "document.getElementById('status').textContent")
    time.sleep(0.1)
  return found
