"""The elementwise step in C++: two passes over memory, 36 bytes a float32 parameter, whatever the number of tensors.

Compilers of array programs for CPUs keep a reduction and an in-place update apart: fused, they write the new state
aside and copy it back. Here the update forms the sums of its own result on the way, so that the first pass reads no
more than g and m (or g alone), and no pass is made to learn what a step predicted. Sums are formed a line of elements
at a time, lines in double precision, chunks in a fixed order: the number of threads changes no bit.

Legend: see ``optimizers.elementwise``. ``state_t`` is what m and v are kept in, ``real`` what is computed in.
"""

SOURCE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct bf16 { uint16_t bits; };

template <class real> inline real load(const real *x, int64_t i) { return x[i]; }
inline float load(const bf16 *x, int64_t i) {
  uint32_t bits = uint32_t(x[i].bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

template <class real> inline void store(real *x, int64_t i, real y) { x[i] = y; }
inline void store(bf16 *x, int64_t i, float y) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  bits += 0x7fffu + ((bits >> 16) & 1u);
  x[i].bits = uint16_t(bits >> 16);
}

inline uint32_t mixed(uint32_t x) {
  x ^= x >> 16; x *= 0x7feb352du;
  x ^= x >> 15; x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// State is rounded up or down at random where it is kept in fewer bits, so that small updates are not lost on average.
template <class real> inline void keep(real *x, int64_t i, real y, uint32_t) { x[i] = y; }
inline void keep(bf16 *x, int64_t i, float y, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  uint32_t up = bits + random;
  bits = (bits & 0x7f800000u) == 0x7f800000u ? bits : up;
  x[i].bits = uint16_t(bits >> 16);
}

enum { SIGN, BETA_1, BETA_2, EPS, LR, DECAY, LOG_1, LOG_2, COLUMNS };
const int64_t LINE = 512;

struct Work {
  int64_t chunks;
  const int32_t *tensor;        // of every chunk
  const int64_t *begin, *end;   // its elements
  const int32_t *kind;          // the class of every tensor
  void **p, **g, **m, **v;
  int64_t classes;
  const double *table;          // [classes][COLUMNS]
  const double *count;          // [classes][2]: gradients that m and v have taken in, this one included
  double *partial;              // [chunks][6]
  int32_t threads;
  uint32_t key;
};

inline double correction(double count, double log_beta) {
  return std::isinf(log_beta) ? 1.0 : -std::expm1(count * log_beta);
}

template <class grad_t, class state_t, class real>
void look(const Work &w, bool squares) {
#pragma omp parallel for schedule(static) num_threads(w.threads)
  for (int64_t c = 0; c < w.chunks; ++c) {
    const int32_t k = w.tensor[c];
    const double *row = w.table + w.kind[k] * COLUMNS;
    const grad_t *g = static_cast<const grad_t *>(w.g[k]);
    const state_t *m = static_cast<const state_t *>(w.m[k]);
    const real sign = real(row[SIGN]), w1 = real(1.0 - row[BETA_1]);
    double mm = 0, gg = 0, zero = 0;
    for (int64_t a = w.begin[c]; a < w.end[c]; a += LINE) {
      const int64_t b = a + LINE < w.end[c] ? a + LINE : w.end[c];
      real x = 0, y = 0, z = 0;
      if (squares) {
#pragma omp simd reduction(+ : x, y, z)
        for (int64_t i = a; i < b; ++i) {
          const real g_i = load(g, i) * sign, m_i = load(m, i);
          const real mean = m_i + (g_i - m_i) * w1;
          x += mean * mean; y += g_i * g_i; z += g_i * real(0);
        }
      } else {
#pragma omp simd reduction(+ : z)
        for (int64_t i = a; i < b; ++i) z += load(g, i) * real(0);
      }
      mm += x; gg += y; zero += z;
    }
    double *out = w.partial + 6 * c;
    out[0] = mm; out[1] = gg; out[2] = zero;
  }
}

// What turns w = m / (max(κv, √v) + ε′) into the step u at learning rate 1: u = ratio · w. Numbers that a whole class
// has in common are multiplied in once, since arithmetic is what this pass would otherwise wait for.
struct Direction {
  double curvature, eps, ratio, c1, c2;
  Direction(const Work &w, int64_t k, double d, double scale) {
    const double *row = w.table + k * COLUMNS, *t = w.count + 2 * k;
    c1 = 1.0 / correction(t[0], row[LOG_1]);
    c2 = 1.0 / correction(t[1], row[LOG_2]);
    const double root = std::sqrt(c2);
    curvature = d * scale * root;
    eps = row[EPS] / root;
    ratio = d * c1 / root;
  }
};

// From the last chunk to the first: the caches still hold what `look` read last.
template <class grad_t, class state_t, class real, bool interior, bool squares>
void move(const Work &w, double d, double scale) {
#pragma omp parallel for schedule(static) num_threads(w.threads)
  for (int64_t n = 0; n < w.chunks; ++n) {
    const int64_t c = w.chunks - 1 - n;
    const int32_t k = w.tensor[c];
    const double *row = w.table + w.kind[k] * COLUMNS;
    const Direction to(w, w.kind[k], d, scale);
    grad_t *p = static_cast<grad_t *>(w.p[k]);
    const grad_t *g = static_cast<const grad_t *>(w.g[k]);
    state_t *m = static_cast<state_t *>(w.m[k]), *v = static_cast<state_t *>(w.v[k]);
    const real sign = real(row[SIGN]), w1 = real(1.0 - row[BETA_1]), b2 = real(row[BETA_2]);
    const real w2 = real(1.0 - row[BETA_2]), eps = real(to.eps), curvature = real(to.curvature);
    const real kept = real(1.0 - row[LR] * row[DECAY]), length = real(row[LR] * to.ratio);
    const uint32_t key = mixed(w.key + uint32_t(k) * 0x9e3779b9u);
    double s[6] = {0, 0, 0, 0, 0, 0};
    for (int64_t a = w.begin[c]; a < w.end[c]; a += LINE) {
      const int64_t b = a + LINE < w.end[c] ? a + LINE : w.end[c];
      real linear = 0, quadratic = 0, square = 0, inside = 0, mass = 0, mean_square = 0;
#pragma omp simd reduction(+ : linear, quadratic, square, inside, mass, mean_square)
      for (int64_t i = a; i < b; ++i) {
        const real g_i = load(g, i) * sign, m_old = load(m, i);
        const real m_i = m_old + (g_i - m_old) * w1;
        const real v_i = load(v, i) * b2 + g_i * g_i * w2;
        const real rms = std::sqrt(v_i), curved = interior ? v_i * curvature : real(0);
        const real direction = m_i / ((curved > rms ? curved : rms) + eps);
        const uint32_t random = sizeof(state_t) == 2 ? mixed(key + uint32_t(i)) : 0u;
        keep(m, i, m_i, random & 0xffffu);
        keep(v, i, v_i, random >> 16);
        store(p, i, real(load(p, i) * kept - length * direction));
        linear += m_i * direction;
        quadratic += v_i * direction * direction;
        square += direction * direction;
        if (interior) inside += curved > rms ? real(1) : real(0);
        mass += sizeof(state_t) == 2 ? load(v, i) : v_i;
        if (squares) mean_square += m_i * m_i;
      }
      s[0] += linear; s[1] += quadratic; s[2] += square; s[3] += inside; s[4] += mass; s[5] += mean_square;
    }
    std::memcpy(w.partial + 6 * c, s, sizeof s);
  }
}

template <class state_t>
void weigh(const Work &w) {
#pragma omp parallel for schedule(static) num_threads(w.threads)
  for (int64_t c = 0; c < w.chunks; ++c) {
    const state_t *v = static_cast<const state_t *>(w.v[w.tensor[c]]);
    double sum = 0;
    for (int64_t a = w.begin[c]; a < w.end[c]; a += LINE) {
      const int64_t b = a + LINE < w.end[c] ? a + LINE : w.end[c];
      auto x = load(v, 0) * 0;
#pragma omp simd reduction(+ : x)
      for (int64_t i = a; i < b; ++i) x += load(v, i);
      sum += x;
    }
    w.partial[6 * c + 4] = sum;
  }
}

// Sums of column `j` over the chunks of every class, chunks in order.
void gather(const Work &w, int j, double *out, int stride) {
  for (int64_t k = 0; k < w.classes; ++k) out[k * stride] = 0;
  for (int64_t c = 0; c < w.chunks; ++c) out[w.kind[w.tensor[c]] * stride] += w.partial[6 * c + j];
}

}  // namespace

#define DISPATCH(kind, CALL)                                  \
  switch (kind) {                                             \
    case 0: { CALL(float, float, float) } break;              \
    case 1: { CALL(double, double, double) } break;           \
    case 2: { CALL(bf16, float, float) } break;               \
    case 3: { CALL(float, bf16, float) } break;               \
    case 4: { CALL(bf16, bf16, float) } break;                \
  }

extern "C" {

// Adds 1 to every count, where the step was taken.
void soaa_count(int64_t n, void **counts, int32_t wide, const uint8_t *finite) {
  for (int64_t i = 0; *finite && i < n; ++i) {
    if (wide) *static_cast<double *>(counts[i]) += 1.0; else *static_cast<float *>(counts[i]) += 1.0f;
  }
}

// Σv of every class, of the state as it is.
void soaa_weigh(const Work *w, int32_t kind, double *mass) {
#define CALL(G, S, R) weigh<S>(*w);
  DISPATCH(kind, CALL)
#undef CALL
  gather(*w, 4, mass, 1);
}

// sums[class] = Σm² of the new m, Σg²; and whether every g is finite.
void soaa_look(const Work *w, int32_t kind, int32_t squares, double *sums, uint8_t *finite) {
#define CALL(G, S, R) look<G, S, R>(*w, squares != 0);
  DISPATCH(kind, CALL)
#undef CALL
  gather(*w, 0, sums, 2);
  gather(*w, 1, sums + 1, 2);
  double zero = 0;
  for (int64_t c = 0; c < w->chunks; ++c) zero += w->partial[6 * c + 2];
  *finite = zero == 0.0;
}

// Takes the step. `scaling`: 0 takes the scale as 1, 1 forms it from `sums` and `mass`, 2 takes `*scale`.
// `rule` of the prediction: 0 ½η², 1 ½η, 2 ½η²(1+s). `found`: P, ‖ηu‖², elements inside, 1+s of this step's own sums.
void soaa_move(const Work *w, int32_t kind, int32_t interior, int32_t scaling, int32_t rule, double size,
               const double *sums, const uint8_t *finite, const double *radius, const double *scale_in, double *mass,
               double *found) {
  if (!*finite) {
    found[0] = found[1] = found[2] = found[3] = NAN;
    return;
  }
  double squares = 0, total = 0, eps = w->table[EPS], scale = 1.0;
  for (int64_t k = 0; scaling == 1 && k < w->classes; ++k) {
    const Direction to(*w, k, *radius, 1.0);
    const double b2 = w->table[k * COLUMNS + BETA_2];
    squares += to.c1 * to.c1 * sums[2 * k];
    total += to.c2 * (b2 * mass[k] + (1.0 - b2) * sums[2 * k + 1]);
  }
  if (scaling == 1) scale = 1.0 + squares / (total + eps * size);
  if (scaling == 2) scale = *scale_in;
  if (std::isnan(scale)) scale = 1.0;
#define CALL(G, S, R)                                                        \
  if (!interior) move<G, S, R, false, false>(*w, *radius, scale);            \
  else if (scaling == 2) move<G, S, R, true, true>(*w, *radius, scale);      \
  else move<G, S, R, true, false>(*w, *radius, scale);
  DISPATCH(kind, CALL)
#undef CALL
  double p = 0, norm = 0, inside = 0;
  squares = total = 0;
  for (int64_t k = 0; k < w->classes; ++k) mass[k] = 0;
  for (int64_t c = 0; c < w->chunks; ++c) {
    const int64_t k = w->kind[w->tensor[c]];
    const Direction to(*w, k, *radius, scale);
    const double *s = w->partial + 6 * c, eta = w->table[k * COLUMNS + LR];
    const double q = rule == 1 ? 0.5 * eta : 0.5 * eta * eta * (rule == 2 ? scale : 1.0);
    p += eta * to.ratio * to.c1 * s[0] - q * to.c2 * to.ratio * to.ratio * s[1];
    norm += eta * eta * to.ratio * to.ratio * s[2];
    inside += s[3];
    mass[k] += s[4];
    squares += to.c1 * to.c1 * s[5];
    total += to.c2 * s[4];
  }
  found[0] = p; found[1] = norm; found[2] = inside; found[3] = 1.0 + squares / (total + eps * size);
}

}
"""
