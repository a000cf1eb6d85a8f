"""The formulas of `tfm` once more: float64, one scalar at a time, no JAX and no matrix product.

Each reference is written for one example, so it can be read beside the paper. The decorator repeats
it over leading axes; its signature gives the shapes in the letters of `tfm`'s dimension key, in
lower case (v stands for d_v in attention).
"""

import math
from functools import partial

import numpy as np


def over_leading_axes(signature):
    return partial(np.vectorize, signature=signature)


def softmax(scores):
    exponentials = [math.exp(score) for score in scores]
    return [exponential / sum(exponentials) for exponential in exponentials]


def matrix_product(a, b):
    rows, inner, columns = len(a), len(b), b.shape[1]
    product = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            product[i, j] = sum(float(a[i, m]) * float(b[m, j]) for m in range(inner))
    return product


def attention_weights(query, key, mask, bias=0.0):
    bias = np.broadcast_to(bias, np.broadcast_shapes(np.shape(bias), mask.shape))
    return _attention_weights(query, key, mask, bias)


@over_leading_axes("(l,d),(k,d),(l,k),(l,k)->(l,k)")
def _attention_weights(query, key, mask, bias):
    d_k = query.shape[1]
    weights = np.zeros(mask.shape)
    for i in range(len(query)):
        allowed = [j for j in range(len(key)) if mask[i, j]]
        scores = [
            sum(float(query[i, m]) * float(key[j, m]) for m in range(d_k)) / math.sqrt(d_k)
            + float(bias[i, j])
            for j in allowed
        ]
        for j, weight in zip(allowed, softmax(scores), strict=True):
            weights[i, j] = weight
    return weights


@over_leading_axes("(l,d),(k,d),(k,v),(l,k)->(l,v)")
def attention(query, key, value, mask):
    return matrix_product(attention_weights(query, key, mask), value)


@over_leading_axes("(l,d),(k,d),(d,d),(d,d),(d,d),(d,d),(),(h,l,k)->(l,d)")
def multi_head_attention(query_input, key_value_input, w_q, w_k, w_v, w_o, num_heads, mask):
    """Concat(head_1, …, head_h) W^O, with a loop over the heads."""
    d_k = w_q.shape[1] // num_heads
    heads = []
    for i in range(num_heads):
        columns = slice(i * d_k, (i + 1) * d_k)
        heads.append(
            attention(
                matrix_product(query_input, w_q[:, columns]),
                matrix_product(key_value_input, w_k[:, columns]),
                matrix_product(key_value_input, w_v[:, columns]),
                mask[i],
            )
        )
    return matrix_product(np.concatenate(heads, axis=1), w_o)


def causal_mask(length):
    return np.array([[j <= i for j in range(length)] for i in range(length)])


@over_leading_axes("(l),(k)->(l,k)")
def segment_mask(query_segments, key_segments):
    return np.array([[k == q and k != 0 for k in key_segments] for q in query_segments])


def relu(x):
    return max(0.0, x)


def swish(x):
    return x / (1 + math.exp(-x))


def gelu(x):
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


@over_leading_axes("(l,d),(d,f),(f),(f,d),(d)->(l,d)")
def feed_forward(x, w1, b1, w2, b2):
    return activated_feed_forward(x, w1, b1, w2, b2, relu)


def activated_feed_forward(x, w1, b1, w2, b2, activation, drop=float):
    hidden = matrix_product(x, w1)
    for i in range(hidden.shape[0]):
        for j in range(hidden.shape[1]):
            hidden[i, j] = drop(activation(hidden[i, j] + b1[j]))
    out = matrix_product(hidden, w2)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] += b2[j]
    return out


@over_leading_axes("(d),(d),(d),()->(d)")
def layer_norm(x, scale, bias, epsilon):
    d_model = len(x)
    mean = sum(x) / d_model
    variance = sum((element - mean) ** 2 for element in x) / d_model
    return np.array(
        [(x[m] - mean) / math.sqrt(variance + epsilon) * scale[m] + bias[m] for m in range(d_model)]
    )


def sinusoidal_position(position, d_model, layout="interleaved"):
    """The encoding of one position."""
    encoding, half = np.zeros(d_model), d_model // 2
    for k in range(half):
        exponent = k / (half - 1) if layout == "tensor2tensor" else 2 * k / d_model
        angle = position / 10000**exponent
        sine, cosine = (2 * k, 2 * k + 1) if layout == "interleaved" else (k, half + k)
        encoding[sine] = math.sin(angle)
        encoding[cosine] = math.cos(angle)
    return encoding


@over_leading_axes("(),(v,d)->(d)")
def embed(token, table):
    d_model = table.shape[1]
    return np.array([float(table[token, m]) * math.sqrt(d_model) for m in range(d_model)])


@over_leading_axes("(d),(d,v),(v)->(v)")
def output_distribution(y, w, b):
    logits = matrix_product(y[None], w)[0]
    return np.array(softmax([logits[v] + b[v] for v in range(len(b))]))


@over_leading_axes("(v),(),()->()")
def label_smoothed_cross_entropy(logits, label, smoothing):
    return smoothed_over(logits, label, smoothing, range(len(logits)))


def smoothed_over(logits, label, smoothing, sharing):
    """-Σ q log p, with the target distribution q written out; `sharing` are who share ε."""
    size = len(logits)
    p = softmax(logits)
    share = smoothing / len(sharing)
    q = [(1 - smoothing) * (v == label) + share * (v in sharing) for v in range(size)]
    return -sum(q[v] * math.log(p[v]) for v in range(size))


def clip_by_global_norm(leaves, threshold):
    """For a list of arrays."""
    norm = math.sqrt(sum(float(element) ** 2 for leaf in leaves for element in leaf.flat))
    factor = min(1.0, threshold / norm) if norm > 0 else 1.0
    return [leaf * factor for leaf in leaves]
