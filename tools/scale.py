"""On paper: the time of a training step on N devices, from a few numbers that are measured or cited. Nothing is run.

  python -m tools.scale                                   # the paper's networks, on the paper's hardware
  python -m tools.scale --image 0.1 --parameters 35.7e6   # your own step, in ms for each image

A step is the share of the batch, then the sum of the gradient around a ring, by way of the host's memory (not with
--copy 0), then the update: fixed + image·batch/N + 2 bytes/copy + 2(N−1)/N bytes/bandwidth + 2(N−1) latency."""
from __future__ import annotations
import argparse
from typing import NamedTuple
from engine.terminal import number, parser, run

class Job(NamedTuple):
  image:float       # s for an image on one device
  parameters:float
  batch:int

# Appendix B of the paper: 21 steps a second of 128 images of 32x32, 2.2 of 64 of 256x256, on the 8 cores of a TPU v3-8,
# "similar to 8 V100 GPUs"; 35.7 and 114 million parameters. An image on one core then takes 8 times a step's share.
CIFAR, LARGE = 8 / 21 / 128, 8 / 2.2 / 64
JOBS = {"32x32, batch 128": Job(CIFAR, 35.7e6, 128), "32x32, batch 2048": Job(CIFAR, 35.7e6, 2048),
        "256x256, batch 64": Job(LARGE, 114e6, 64), "256x256, batch 2048": Job(LARGE, 114e6, 2048)}
DEVICES = [2**k for k in range(11)]

def step(job:Job, n:int, a:argparse.Namespace, size:int=4, overlap:bool=False) -> float:
  """Seconds of a step on n devices. size: bytes of a number of the gradient. overlap: the sum is hidden behind the
  backward pass, two thirds of the arithmetic, as far as that lasts."""
  work, moved = job.image * job.batch / n, job.parameters * size
  if n == 1: return a.fixed / 1e3 + work
  copied = 2 * moved / a.copy / 1e9 if a.copy else 0
  summed = copied + 2 * (n - 1) / n * moved / a.bandwidth / 1e9 + 2 * (n - 1) * a.latency / 1e6
  return a.fixed / 1e3 + (work / 3 + max(work * 2 / 3, summed) if overlap else work + summed)

def show(name:str, job:Job, a:argparse.Namespace):
  """The table of a job, and up to how many devices each half of what is paid for is used."""
  ways = {"ms": (4, False), "16 bits": (2, False), "overlap": (4, True), "both": (2, True)}
  print(f"\n{name}, {job.parameters / 1e6:.1f} million parameters")
  print("| devices | " + " | ".join(ways) + " | used |\n" + "|---" * 6 + "|")
  pays = dict.fromkeys(ways, 1)
  for n in [n for n in DEVICES if n <= job.batch]:
    took = {way: step(job, n, a, *how) for way, how in ways.items()}
    used = {way: step(job, 1, a) / n / t for way, t in took.items()}
    pays |= {way: n for way in ways if used[way] >= 0.5}
    print(f"| {n} | " + " | ".join(f"{1e3 * t:.1f}" for t in took.values()) + f" | {used['ms']:.0%} |")
  print("half of the devices' time is used up to " + ", ".join(f"{n} ({way})" for way, n in pays.items()))

def main(argv:list[str]|None=None):
  p = parser("tools.scale", "The time of a training step on 1 to 1,024 devices, on paper.")
  add = p.add_argument
  add("--image", type=number(float, 1e-6), help="ms for an image on one device (default: the paper's own)")
  add("--parameters", type=number(float, 1), help="with --image (35.7e6)")
  add("--batch", type=number(int, 1), help="with --image (128)")
  add("--fixed", type=number(float, 0), default=2, help="ms of a step that no device is spared (%(default)s)")
  add("--bandwidth", type=number(float, 1e-3), default=25, help="GB/s around the ring (%(default)s: 200 Gb/s)")
  add("--latency", type=number(float, 0), default=5, help="us from one device to the next (%(default)s)")
  add("--copy", type=number(float, 0), default=20, help="GB/s between device and host (%(default)s); 0: no copy")
  a = p.parse_args(argv)
  if a.image is None and (a.parameters or a.batch): p.error("--parameters and --batch go with --image")
  a.parameters, a.batch = a.parameters or 35.7e6, a.batch or 128
  jobs = JOBS if a.image is None else {f"batch {a.batch}": Job(a.image / 1e3, a.parameters, a.batch)}
  for name, job in jobs.items(): show(name, job, a)

if __name__ == "__main__": run(main)
