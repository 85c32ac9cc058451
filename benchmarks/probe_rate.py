"""What rate and decay the linear probe wants, on held-out training images.

    python simsiam.py --epochs 8 --evaluate-on validation --name chosen
    python benchmarks/probe_rate.py results/simsiam/chosen

Without `--evaluate-on validation` the encoder has seen the held-out images, if not their labels.
"""

import argparse
from pathlib import Path

from common import ROOT

import functions
from support import frozen
from support.runs import exit_cleanly


def main() -> None:
    """Print accuracies of the probe on both kinds of images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--epochs", type=int, default=100, help="of each probe [100]")
    arguments = parser.parse_args()
    encoder = frozen.load_encoder(arguments.run, "cpu")
    name, size, rules = encoder.record["dataset"], encoder.size, encoder.rules
    data = functions.load_images(name, ROOT / "data", size, None, rules).with_validation_split()
    inputs = []
    for part in (data.train, data.test):
        inputs += [functions.extract_features(encoder.network, part, encoder.fabric), part.labels]
    count = inputs[0].shape[1]
    print(f"{count:,} features    rate    decay  training  held out")
    for rate in (0.01, 0.001, 1 / count):
        for decay in (5e-6, 1e-3):
            result = functions.linear_probe(*inputs, arguments.epochs, rate, decay)
            trained = result.history[-1]["train_accuracy"]
            print(f"{rate:22.5f}  {decay:7.0e}  {trained:8.1%}  {result.accuracy:8.1%}", flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
