"""Use, placement and offloading of the experts of some models, as a table: see README.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from moecule import Compute, expert_load
from moecule.data import Sampling


def main() -> None:
    """Print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    found = {
        model.name: expert_load(
            model,
            gpus=4,
            replicas=1,
            cache_experts=("25%", "50%", "75%"),
            data=args.data,
            sampling=Sampling(samples=args.samples),
            compute=Compute(device="cpu"),
        )
        for model in args.models
    }
    print("| model | hottest expert / mean | unused | before | after | unseen |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, of in found.items():
        over = [x.max_over_mean for x in of.layers]
        unused = sum(x.count.count(0) for x in of.layers)
        print(
            f"| {name} | {min(over):.2f} to {max(over):.2f} | {unused} of "
            f"{sum(len(x.count) for x in of.layers)} | {of.balance_before:.3f} | "
            f"{of.balance_after:.3f} | {of.balance_unseen:.3f} |"
        )
    print("\n| model | cache, experts a layer | policy | hits | loads a token |")
    print("|---|--:|---|--:|--:|")
    for name, of in found.items():
        for cache in of.offloading:
            for p in cache.policies:
                n = len(of.layers[0].count)
                print(
                    f"| {name} | {cache.cache_experts} of {n} | {p.policy} | "
                    f"{100 * p.hit_rate:.1f} % | {p.loads_per_token:.2f} |"
                )
        print(f"| {name} | | next gate guesses right | {100 * cache.guess_recall:.1f} % | |")


if __name__ == "__main__":
    main()
