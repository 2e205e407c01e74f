"""Float64 references, written as loops from the formulas in the paper and its sources; and random cases for them."""

import numpy as np


def random_case(seed, rows=7, length=6):
    """Float64 arrays and a prefix mask whose row lengths include 0 and `length`."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[0, length], rng.integers(0, length + 1, rows - 2)])
    mask = np.arange(length) < rng.permutation(lengths)[:, None]
    arrays = [rng.normal(size=(rows, length)) for _ in range(4)]
    return arrays, mask, rng


def poison(x, mask, rng):
    """A float32 copy of `x` with NaN, infinities and huge numbers outside the mask."""
    garbage = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30], size=x.shape)
    return np.where(mask, x, garbage).astype(np.float32)


def gae(rewards, values, mask, gamma, lam):
    advantages = np.zeros(rewards.shape)
    returns = np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        length = int(mask[b].sum())
        for t in range(length):
            for later in range(t, length):
                next_value = values[b, later + 1] if later + 1 < length else 0.0
                delta = rewards[b, later] + gamma * next_value - values[b, later]
                advantages[b, t] += (gamma * lam) ** (later - t) * delta
            returns[b, t] = advantages[b, t] + values[b, t]
    return advantages, returns


def whiten(x, mask, shift_mean=True, rows=None):
    counted = mask if rows is None else mask & rows[:, None]
    picked = [x[b, t] for b in range(x.shape[0]) for t in range(x.shape[1]) if counted[b, t]]
    out = np.where(mask, x, 0.0)
    if not picked:
        return out
    mean = sum(picked) / len(picked)
    variance = sum((p - mean) ** 2 for p in picked) / len(picked)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if counted[b, t]:
                out[b, t] = (x[b, t] - mean) / np.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    return out


def whiten_cells(x, mask, exits, kinds, min_rows, min_std, rows):
    """The (exit, kind) of a row if it has enough rows, else its kind, else everything."""
    out = np.where(mask, x, 0.0)
    counted = [b for b in range(len(mask)) if rows[b] and mask[b].any()]
    for b in counted:
        same_kind = [c for c in counted if kinds[c] == kinds[b]]
        cell = [c for c in same_kind if exits[c] == exits[b]]
        used = next((group for group in (cell, same_kind) if len(group) >= min_rows), counted)
        tokens = [x[c, t] for c in used for t in range(x.shape[1]) if mask[c, t]]
        mean = sum(tokens) / len(tokens)
        std = (sum((token - mean) ** 2 for token in tokens) / len(tokens)) ** 0.5
        out[b] = np.where(mask[b], (x[b] - mean) / max(std, min_std), 0.0)
    return out


def group_advantages(rewards, valid, group_size, scaled):
    """(advantages, compared): zero and false where fewer than two of a group are valid."""
    advantages, compared = np.zeros(len(rewards)), np.zeros(len(rewards), bool)
    for start in range(0, len(rewards), group_size):
        group = [row for row in range(start, start + group_size) if valid[row]]
        if len(group) < 2:
            continue
        mean = sum(rewards[row] for row in group) / len(group)
        std = (sum((rewards[row] - mean) ** 2 for row in group) / (len(group) - 1)) ** 0.5
        for row in group:
            others = [rewards[other] for other in group if other != row]
            advantages[row] = (
                (rewards[row] - mean) / (std + 1e-4) if scaled else rewards[row] - sum(others) / len(others)
            )
            compared[row] = True
    return advantages, compared


def kl(log_prob, ref_log_prob, kind):
    d = log_prob - ref_log_prob
    return {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[kind]


def token_rewards(scores, log_probs, ref_log_probs, mask, kl_coef, kind):
    out = np.zeros(mask.shape)
    for b in range(mask.shape[0]):
        length = int(mask[b].sum())
        for t in range(length):
            out[b, t] = -kl_coef * kl(log_probs[b, t], ref_log_probs[b, t], kind)
        if length:
            out[b, length - 1] += scores[b]
    return out


def policy_loss(log_probs, old, advantages, mask, eps, dual_clip=None):
    """(loss, d loss / d log_probs, stats)."""
    n = max(int(mask.sum()), 1)
    loss, gradient, ratios, clipped, kl2 = 0.0, np.zeros(mask.shape), [], 0, 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        d, a = log_probs[b, t] - old[b, t], advantages[b, t]
        k = np.exp(d)
        plain, bounded = -k * a, -min(max(k, 1 - eps), 1 + eps) * a
        cost, slope = max(plain, bounded), plain if plain >= bounded else 0.0
        if dual_clip is not None and a < 0 and cost > -dual_clip * a:
            cost, slope = -dual_clip * a, 0.0
        loss += cost / n
        gradient[b, t] = slope / n
        ratios.append(k)
        clipped += bounded > plain
        kl2 += d * d / 2
    mean = sum(ratios) / n
    stats = {
        "ratio": mean,
        "ratio_var": sum((k - mean) ** 2 for k in ratios) / n,
        "ratio_max": max(ratios, default=0.0),
        "clipfrac": clipped / n,
        "approxkl": kl2 / n,
    }
    return loss, gradient, stats


def value_loss(values, old, returns, mask, clip=None):
    """(loss, d loss / d values, clipfrac)."""
    n = max(int(mask.sum()), 1)
    loss, gradient, clipped_count = 0.0, np.zeros(mask.shape), 0
    for b, t in zip(*np.nonzero(mask), strict=True):
        v, target = values[b, t], returns[b, t]
        error, slope = (v - target) ** 2, 2 * (v - target)
        if clip is not None:
            low, high = old[b, t] - clip, old[b, t] + clip
            bounded = min(max(v, low), high)
            if (bounded - target) ** 2 > error:
                error = (bounded - target) ** 2
                slope = 2 * (bounded - target) if low < v < high else 0.0
                clipped_count += 1
        loss += error / n
        gradient[b, t] = slope / n
    return loss, gradient, clipped_count / n


def dpo_loss(log_probs, ref_log_probs, mask, beta):
    """(loss, d loss / d log_probs, stats)."""
    n = max(int(mask.sum()), 1)
    loss, gradient, rewards = 0.0, np.zeros(log_probs.shape), []
    for b in np.flatnonzero(mask):
        chosen, rejected = (beta * (log_probs[b, which] - ref_log_probs[b, which]) for which in (0, 1))
        wrong = 1 / (1 + np.exp(chosen - rejected))
        loss += -np.log(1 - wrong) / n
        gradient[b] = np.array([-beta, beta]) * wrong / n
        rewards.append((chosen, rejected))
    stats = {
        "chosen": sum(c for c, _ in rewards) / n,
        "rejected": sum(r for _, r in rewards) / n,
        "margins": sum(c - r for c, r in rewards) / n,
        "accuracies": sum(c > r for c, r in rewards) / n,
    }
    return loss, gradient, stats
