"""prototype"""
from __future__ import annotations

from math import inf

from .clock import Draft
from .problem import Problem, first_positions, next_positions


class Search:
    def __init__(self, problem, from_boundary, from_start):
        self.p = p = problem
        n = p.length
        S = len(p.sizes)
        self.H, self.G = from_boundary, from_start
        self.need = [sum(1 << s for s in nd) for nd in p.needs]
        up = [n] * S
        order = []
        self.order = [()] * (n + 1)
        self.future = [0] * (n + 1)
        fut = 0
        for i in range(n - 1, -1, -1):
            for s in p.needs[i]:
                if up[s] < n:
                    order.remove(s)
                up[s] = i
                order.insert(0, s)
                fut |= 1 << s
            self.order[i] = tuple((1 << s, s, p.copy_seconds[s], from_start[up[s]]) for s in order)
            self.future[i] = fut
        self.memo = {}

    def total(self, mask):
        r = self.memo.get(mask)
        if r is None:
            r = 0
            m = mask
            sizes = self.p.sizes
            while m:
                b = m & -m
                r += sizes[b.bit_length() - 1]
                m ^= b
            self.memo[mask] = r
        return r

    def victims(self, i, pool, excess, limit):
        """minimal sets of pool (mask) with total>=excess; per size class furthest first"""
        sizes = self.p.sizes
        far = [(b, sizes[s]) for b, s, _, _ in reversed(self.order[i + 1]) if pool & b]
        out = []
        n = len(far)
        suffix = [0] * (n + 1)
        for j in range(n - 1, -1, -1):
            suffix[j] = suffix[j + 1] + far[j][1]

        def rec(j, mask, need, least, skipped):
            # least: smallest chosen size
            if need <= 0:
                if least + need > 0:  # minimal: dropping smallest breaks it
                    out.append(mask)
                return
            if j == n or suffix[j] < need or len(out) >= limit:
                return
            b, w = far[j]
            if w not in skipped:
                rec(j + 1, mask | b, need - w, w if w < least else least, skipped)
            rec(j + 1, mask, need, least, skipped | {w})

        rec(0, 0, excess, inf, frozenset())
        return out

    def run(self, best, width, reach=None, fan=10**9, vfan=10**9, prefer="few", maxlabels=10**9):
        """returns (seconds, trace, proven_bound)"""
        p = self.p
        n = p.length
        sizes, copy = p.sizes, p.copy_seconds
        H, G = self.H, self.G
        start = sum(1 << s for s in p.resident) & self.future[0]
        labels = [(0.0, 0.0, 0.0, 0.0, start, -1, None)]
        dropped = inf
        eps = 1e-12 * max(1.0, H[0])
        count = 0
        capped = False
        for i in range(n):
            room, sec = p.room[i], p.seconds[i]
            need = self.need[i]
            fut = self.future[i + 1]
            order = self.order[i + 1]
            base_h = H[i + 1]
            table = {}
            for lab in labels:
                _, _, t, lam, held, fly, _ = lab
                flybit = 1 << fly if fly >= 0 else 0
                miss = need & ~held
                lam1 = lam
                fetch0 = []
                m = miss
                while m:
                    b = m & -m
                    s = b.bit_length() - 1
                    lam1 += copy[s]
                    fetch0.append(s)
                    m ^= b
                if miss or flybit & need:
                    t2 = lam1 + sec
                else:
                    t2 = t + sec
                must = (need & held) | flybit | miss
                musttot = self.total(must)
                if musttot > room:
                    continue
                choices = []
                if lam1 >= t2:
                    choices.append((0, (), lam1, -1))
                else:
                    cand = [(b, s, c) for b, s, c, _ in order if not (held | miss) & b]
                    if reach is not None:
                        cand = cand[:reach]

                    def rec(j, mask, seq, lam2, tot, skipped):
                        if len(choices) >= fan:
                            return
                        for q in range(j, len(cand)):
                            b, s, c = cand[q]
                            w = sizes[s]
                            if w in skipped or tot + w > room:
                                continue
                            if lam2 + c <= t2:
                                rec(q + 1, mask | b, seq + (s,), lam2 + c, tot + w, skipped)
                            else:
                                choices.append((mask | b, seq + (s,), lam2 + c, s))
                            skipped = skipped | {w}
                        choices.append((mask, seq, lam2, -1))

                    # straddlers earlier in order than chosen completes
                    rec(0, 0, (), lam1, musttot, frozenset())
                    if reach is None:
                        extra = []
                        for mask, seq, lam2, f in choices:
                            if f >= 0 or not seq or lam2 >= t2:
                                continue
                            tot = musttot + self.total(mask)
                            for b, s, c in cand:
                                if mask & b or lam2 + c <= t2 or tot + sizes[s] > room:
                                    continue
                                extra.append((mask | b, seq + (s,), lam2 + c, s))
                        choices += extra
                seen = set()
                for mask, seq, lam2, f in choices:
                    if (mask, f) in seen:
                        continue
                    seen.add((mask, f))
                    if f < 0 and lam2 > t2 and not miss:
                        f = fly
                    if f >= 0 and not fut >> f & 1:
                        f = -1
                    lam3 = lam2 if lam2 > t2 else t2
                    if lam3 == t2:
                        f = -1
                    core = must | mask
                    opt = held & ~core & fut
                    excess = self.total(core) + self.total(opt) - room
                    rels = self.victims(i, opt, excess, vfan) if excess > 0 else (0,)
                    for rel in rels:
                        now_held = (core | opt & ~rel) & fut
                        # bound
                        h = t2 + base_h
                        x = lam3
                        for b, s, c, g in order:
                            if not now_held & b:
                                x += c
                                if x + g > h:
                                    h = x + g
                            elif s == f and lam3 + g > h:
                                h = lam3 + g
                        if h >= best - eps:
                            continue
                        key = (now_held, f)
                        tie = x if prefer == "few" else -lam3
                        new = (h, tie, t2, lam3, now_held, f, (lab, rel, fetch0, seq))
                        old = table.get(key)
                        if old is None:
                            table[key] = [new]
                        else:
                            for o in old:
                                if o[2] <= t2 and o[3] <= lam3:
                                    break
                            else:
                                table[key] = [o for o in old if not (t2 <= o[2] and lam3 <= o[3])] + [new]
            labels = [x for labs in table.values() for x in labs]
            labels.sort(key=lambda x: x[:2])
            count += len(labels)
            if len(labels) > width:
                dropped = min(dropped, labels[width][0])
                labels = labels[:width]
            elif 1 < len(labels):
                labels = self.undominated(labels)
            if count > maxlabels:
                return best, None, 0.0, count
        exact = reach is None and fan >= 10**9 and vfan >= 10**9
        if not labels:
            return best, None, min(best, dropped) if exact else 0.0, count
        lab = min(labels, key=lambda x: x[2])
        return lab[2], self.trace(lab), min(lab[2], dropped) if exact else 0.0, count

    def undominated(self, labels):
        if len(labels) > 3000:
            return labels
        labels.sort(key=lambda x: (-x[4].bit_count(), x[2], x[3]))
        kept = []
        for x in labels:
            _, _, t, lam, held, f, _ = x
            for y in kept:
                if y[4] & held == held and y[2] <= t and (y[5] < 0 or (y[5] == f and y[3] <= lam)):
                    break
            else:
                kept.append(x)
        kept.sort(key=lambda x: x[:2])
        return kept

    def trace(self, lab):
        p = self.p
        d = Draft.empty(p)
        i = p.length - 1
        while lab[6] is not None:
            parent, rel, f0, seq = lab[6]
            core = lab[4]
            d.fetch[i] = [*f0, *seq]
            # released = parent held - (now kept)
            before = parent[4]
            d.release[i] = [s for s in range(len(p.sizes)) if rel >> s & 1]
            lab = parent
            i -= 1
        # dead ones: release after last use
        from .tidy import without_waste
        return without_waste(p, d)
        last = {}
        for k, nd in enumerate(p.needs):
            for s in nd:
                last[s] = k
        for s in list(held):
            if s not in last and p.length:
                d.release[0].append(s)
        for s, k in last.items():
            if k + 1 < p.length:
                d.release[k + 1].append(s)
        return d
