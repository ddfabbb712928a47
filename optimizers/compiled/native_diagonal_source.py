"""The native pass of a diagonal curvature on a CPU, as C++: one formula an element, 24 bytes a parameter.

Legend: see ``optimizers.diagonal_step``. m ← m + (1-β)(g - m); h̃ = max(γ hᵏ, ε) + λ; u = (m/c) / h̃, cut to [-r, r];
θ ← (1-ηλ_wd) θ - η u.
"""

SOURCE = r"""
namespace {

enum { D_MEAN, D_INVERSE, D_SCALE, D_POWER, D_FLOOR, D_DAMPING, D_RADIUS, D_LR, D_KEPT, D_COLUMNS };

struct Diagonal {
  int64_t chunks;
  const int32_t *tensor;        // of every chunk
  const int64_t *begin, *end;   // its elements
  void **p, **g, **m, **h;
  const double *table;          // [tensors][D_COLUMNS]
  int32_t threads;
};

// `root`: k is ½. A comparison with NaN is false, so that NaN stays NaN, as torch.clamp leaves it.
template <class param_t, class real, bool root>
void diagonal(const Diagonal &w) {
#pragma omp parallel for schedule(static) num_threads(w.threads)
  for (int64_t c = 0; c < w.chunks; ++c) {
    const int32_t t = w.tensor[c];
    const double *row = w.table + t * D_COLUMNS;
    param_t *p = static_cast<param_t *>(w.p[t]);
    const real *g = static_cast<const real *>(w.g[t]), *h = static_cast<const real *>(w.h[t]);
    real *m = static_cast<real *>(w.m[t]);
    const real weight = real(row[D_MEAN]), inverse = real(row[D_INVERSE]), scale = real(row[D_SCALE]);
    const real least = real(row[D_FLOOR]), damping = real(row[D_DAMPING]), radius = real(row[D_RADIUS]);
    const real eta = real(row[D_LR]), kept = real(row[D_KEPT]);
#pragma omp simd
    for (int64_t i = w.begin[c]; i < w.end[c]; ++i) {
      const real m_i = m[i] + (g[i] - m[i]) * weight;
      m[i] = m_i;
      const real curved = scale * (root ? std::sqrt(h[i]) : h[i]);
      real u = m_i * inverse / ((curved < least ? least : curved) + damping);
      u = u > radius ? radius : (u < -radius ? -radius : u);
      store(p, i, real(load(p, i) * kept - eta * u));
    }
  }
}

}  // namespace

extern "C" {

// `kind`: 0 float, 1 double, 2 parameters in bfloat16 beside state in float.
void soaa_diagonal(const Diagonal *w, int32_t kind, int32_t root) {
#define DIAGONAL(P, R) if (root) diagonal<P, R, true>(*w); else diagonal<P, R, false>(*w);
  switch (kind) {
    case 0: { DIAGONAL(float, float) } break;
    case 1: { DIAGONAL(double, double) } break;
    case 2: { DIAGONAL(bf16, float) } break;
  }
#undef DIAGONAL
}

}
"""
