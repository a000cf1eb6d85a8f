"""Question 6: what are positional encodings, and what problem do they solve?"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import tfm
from experiments.claims import drawing, study
from experiments.claims.evidence import Budget, Claim, Estimate, Hypothesis, Text, exact, paired_t
from experiments.reporting import style

LENGTH, D_MODEL = 100_000, 512  # of the table whose rows are told apart
SHIFTS = (1, 7, 100, 1000)
STRETCHES = (0, 50_000, 94_000)  # where the stretches of 5,000 positions begin that are shifted
LEARNED = {"positions": "learned", "max_learned_positions": 40}
MARGIN = 0.02  # nats a sound: losses closer than that are called equal
TRAINED, LONGER = range(4, 9), range(9, 13)  # lengths of the sequences to be written backwards
PROBES = (0, 4, 8, 12, 16, 20)  # the pieces of that training after which the share is taken

HYPOTHESES = {
    "distinct": Hypothesis(
        Text("All 100,000 positions have encodings of their own.",
             "十万个位置的编码各不相同。"),
        "smallest distance of two rows, d_model 512", 0.1),
    "rotation": Hypothesis(
        Text("A shift is a rotation: PE(i + Δ) = R(Δ) PE(i), with one R(Δ) for every i.",
             "平移就是旋转：PE(i + Δ) = R(Δ) PE(i)，R(Δ) 与 i 无关。"),
        "largest |error| in f32, i in three stretches up to 10⁵, Δ = 1 … 1000", bound=1e-6),
    "relative": Hypothesis(
        Text("PE(i)·PE(i + Δ) depends on Δ alone.", "PE(i)·PE(i + Δ) 只取决于 Δ。"),
        "largest spread over the same i, as a share of PE(i)·PE(i) = d_model/2", bound=1e-6),
    "blind": Hypothesis(
        Text("Without positions the encoder is blind to order: permuted in, permuted out.",
             "没有位置编码时，编码器对次序视而不见：输入重排，输出随之重排。"),
        "largest |error|", bound=1e-5),
    "repairs": Hypothesis(
        Text("They repair that: writing a sequence backwards is learned with them and not without.",
             "位置编码弥补了这一点：有它能学会倒写序列，没有则不能。"),
        "share of sequences right with positions minus without", 0.5),
    "pronunciation": Hypothesis(
        Text("Pronouncing words is learned better with them.", "有位置编码，发音任务学得更好。"),
        "validation loss without positions minus with them, nats a sound", 0.02),
    "as_learned": Hypothesis(
        Text("Sinusoids and learned positions come out equal, to 0.02 nats a sound.",
             "正弦编码与可学习的位置编码效果相当，相差不超过每音 0.02 nat。"),
        f"{MARGIN} minus the size of the difference in validation loss, nats a sound"),
    "longer": Hypothesis(
        Text("They carry over to lengths longer than in training (9–12 after 4–8).",
             "能推广到比训练时更长的序列（训练 4–8，测试 9–12）。"),
        "share of longer sequences written backwards rightly", 0.5),
}  # fmt: skip


def scaled(factor: float | Array) -> tfm.Functions:
    """The model's functions with PE times `factor`: 1 is the paper's, 0 is no position at all."""
    return tfm.Functions(
        sinusoidal_positions=lambda where, d_model: (
            factor * tfm.sinusoidal_positions(where, d_model)
        )
    )


def _distances() -> np.ndarray:
    """‖PE(Δ) − PE(0)‖ for Δ = 1 … LENGTH − 1: by the rotation, that of any rows Δ apart."""
    with jax.enable_x64(True):
        distances = []
        for start in range(0, LENGTH, 10_000):
            rows = tfm.sinusoidal_positions(jnp.arange(start, start + 10_000), D_MODEL)
            origin = tfm.sinusoidal_positions(1, D_MODEL)
            distances.append(np.linalg.norm(np.asarray(rows - origin), axis=1))
    return np.concatenate(distances)[1:]


def _shift_errors() -> dict[str, float]:
    """R(Δ) turns the k-th pair of features by the angle Δ / 10000^{2k/d_model}."""
    frequencies = 10000.0 ** (-np.arange(0, D_MODEL, 2) / D_MODEL)
    rotation, products = 0.0, {shift: [] for shift in SHIFTS}
    for start in STRETCHES:
        where = jnp.arange(start, start + 5000 + max(SHIFTS))
        table = np.asarray(tfm.sinusoidal_positions(where, D_MODEL), np.float64)
        sin, cos = table[:, 0::2], table[:, 1::2]
        for shift in SHIFTS:
            s, c = np.sin(shift * frequencies), np.cos(shift * frequencies)
            later = slice(shift, 5000 + shift)
            turned = (sin[:5000] * c + cos[:5000] * s, cos[:5000] * c - sin[:5000] * s)
            for got, expected in zip(turned, (sin[later], cos[later]), strict=True):
                rotation = max(rotation, float(np.abs(got - expected).max()))
            products[shift].append((table[:5000] * table[later]).sum(1))
    relative = max(float(np.ptp(np.concatenate(sums))) for sums in products.values())
    return {"rotation": rotation, "relative": relative / (D_MODEL / 2)}


def _equivariance_error(seed: int) -> float:
    config = tfm.TransformerConfig(vocab_size=30, d_model=32, d_ff=64, num_heads=4,
                                   num_encoder_layers=2, num_decoder_layers=1)  # fmt: skip
    model = tfm.Transformer(config, scaled(0.0))
    tokens = jax.random.randint(jax.random.key(seed), (1, 12), 3, 30)
    variables = model.init(jax.random.key(seed), tokens, tokens)
    order = jax.random.permutation(jax.random.key(seed + 1), 12)
    plain, permuted = (
        model.apply(variables, t, method="encode")[0] for t in (tokens, tokens[:, order])
    )
    return float(jnp.abs(permuted - plain[:, order]).max())


def _train(budget: Budget) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Losses in pronouncing [seeds]; {'right', 'longer'} shares in reversing [seeds, probes]."""
    words, backwards = study.pronunciation(), study.reversal(TRAINED)
    longer = study.reversal(LONGER, seed=1).valid

    def probe(model, params, task):
        judged = study.judge_batch(model, params, task.valid)
        at_length = study.judge_batch(model, params, longer)
        return {"right": 1 - judged["wrong"], "longer": 1 - at_length["wrong"]}

    def one(task: study.Task, steps: int, factors: tuple[float, ...], changes: dict, **options):
        def make(factor: Array) -> study.Trainee:
            model = tfm.Transformer(task.config(**changes), scaled(factor))
            return study.Trainee(model, study.optimizer(steps))

        return study.train(budget, task, make, steps, {"factor": factors}, **options).probes

    fixed = one(words, budget.steps(500), (1.0, 0.0), {})["loss"][..., -1]
    # The factor of the sinusoids has no part in a model that learns its positions.
    learned = one(words, budget.steps(500), (1.0,), LEARNED)["loss"][0, :, -1]
    at = {"probe": probe, "probe_at": PROBES}
    shares = one(backwards, budget.steps(1000), (1.0, 0.0), {}, **at)
    return (
        {"sinusoidal": fixed[0], "none": fixed[1], "learned": learned},
        {kind: {n: v[i] for n, v in shares.items()} for i, kind in enumerate(("with", "without"))},
    )


def _draw(distances: np.ndarray, losses: dict, shares: dict) -> Figure:
    figure, (apart, reversing, words) = style.panels(
        "Distance of rows Δ apart", "Writing backwards", "Pronouncing words"
    )
    places = np.unique(np.geomspace(1, len(distances), 300).astype(int))
    apart.plot(places, distances[places - 1], color=style.LINES[0], lw=1.3)
    apart.set_xscale("log")
    apart.set_ylim(bottom=0)
    style.level(apart, HYPOTHESES["distinct"].threshold, "δ")
    style.label(apart, "Δ, positions", "‖PE(i + Δ) − PE(i)‖")
    done = np.array(PROBES) / study.PIECES * 100
    drawing.bands(reversing, done, {
        "with positions": shares["with"]["right"],
        "without": shares["without"]["right"],
        "with, longer ones": shares["with"]["longer"],
    })  # fmt: skip
    reversing.set_ylim(-0.02, 1.02)
    style.label(reversing, "steps done, %", "share of sequences right")
    drawing.points(words, losses)
    style.label(words, "positions", "validation loss, nats a sound")
    return figure


def _equal(difference: Estimate, margin: float) -> Estimate:
    """margin − |difference|: above 0 where the whole interval lies within ± margin."""
    low, high = difference.interval
    most, least = max(abs(low), abs(high)), max(low, -high, 0.0)
    return Estimate(margin - abs(difference.effect), (margin - most, margin - least),
                    difference.seeds)  # fmt: skip


def measure(budget: Budget) -> tuple[dict[str, Estimate], Figure]:
    """The table; then trainings with, without and with learned positions."""
    distances = _distances()
    losses, shares = _train(budget)
    errors = _shift_errors() | {"blind": _equivariance_error(budget.first_seed)}
    right = {kind: share["right"][:, -1] for kind, share in shares.items()}
    estimates = {name: exact(error) for name, error in errors.items()} | {
        "distinct": exact(distances.min()),
        "repairs": paired_t(right["with"] - right["without"]),
        "pronunciation": paired_t(losses["none"] - losses["sinusoidal"]),
        "as_learned": _equal(paired_t(losses["learned"] - losses["sinusoidal"]), MARGIN),
        "longer": paired_t(shares["with"]["longer"][:, -1]),
    }
    return estimates, _draw(distances, losses, shares)


CLAIM = Claim(
    id="positions",
    question=Text("What are positional encodings, and what problem do they solve?",
                  "Transformer 模型中的位置编码如何数学上表示，它解决了什么问题？"),
    formula="PE(i, 2k) = sin(i/10000^{2k/d_model}), PE(i, 2k+1) = cos(i/10000^{2k/d_model})",
    function=tfm.sinusoidal_positions,
    hypotheses=HYPOTHESES,
    measure=measure,
    lesson=Text(
        "Attention sees a set, not a sequence. Each position therefore gets a vector of clock "
        "hands that turn at different speeds; moving on by Δ turns every hand by a fixed angle, "
        "so the distance of two positions can be read from their product. That a model can read "
        "it does not mean that it has learned to for lengths that it never saw.",
        "注意力看到的是集合而不是序列。因此给每个位置一组转速不同的“指针”；前进 Δ "
        "相当于每根指针转过固定的角度，两个位置的距离可由内积读出。"
        "但“可以读出”并不等于模型在没见过的长度上也学会了读。",
    ),
)  # fmt: skip
