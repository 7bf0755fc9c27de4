"""Time every method at equal FLOPs: `python scripts/benchmark.py --help`."""

import hydra
from omegaconf import DictConfig

from dhtm.harness.benchmark import benchmark
from dhtm.harness.errors import command


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark")
@command
def main(config: DictConfig) -> None:
    benchmark(config)


if __name__ == "__main__":
    main()
