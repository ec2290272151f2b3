// Tests of the trainer: reference files replayed, gradients against finite differences, and everything that a
// run relies on. `make test` needs no Python.
//
//   ./test_srdit              all tests, on the files of dev/ref
//   ./test_srdit FILE ...     replay these reference files (F64 files in double, F32 files in float)
//
// This file is compiled twice into one program: over a trainer in float, and over the CPU trainer in double
// (-DUSE_DOUBLE), whose copy of the code is reached by the functions that end in _double.
#ifdef TEST_CUDA   // over train_srdit.cu: compared with the CPU, see the end
#define SAMPLE_FILE "sample.cu"
#else
#define SAMPLE_FILE "sample.c"
#endif
#define SAMPLE_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"   // a test program does not call everything it includes
#include SAMPLE_FILE                                 // and with it the trainer
#include <glob.h>
#include <sys/wait.h>
#ifdef TEST_CUDA
static const Backend *backend = &gpu_backend;
#else
static const Backend *const backend = &cpu_backend;
#endif

#ifdef USE_DOUBLE
static const char *const precision = "double";
#else
static const char *const precision = "float";
#endif
static int passed, failed;

// One test: prints its line and counts it
__attribute__((format(printf, 3, 4))) static void result(int good, const char *name, const char *format,
                                                         ...) {
    va_list args;
    va_start(args, format);
    printf("%-4s %-28s ", good ? "ok" : "FAIL", name);
    vprintf(format, args);
    printf("\n");
    fflush(stdout);
    va_end(args);
    if (good) passed++;
    else failed++;
}

// Is x worse than the worst so far? NaN is, and then nothing else.
static int worsens(double *worst, double x) {
    if (isnan(*worst) || x <= *worst) return 0;
    *worst = x;
    return 1;
}

// One comparison: the largest |got - want| over the tensor, as a share of what is allowed
typedef struct {
    char name[96];
    double error, tolerance, share;
} Check;
typedef struct {
    Check *checks;
    int count, room, failed;
    double override_tolerance;
} Report;

static void report_add(Report *r, const char *name, double error, double tolerance) {
    if (r->count == r->room) {
        r->room = 2 * r->room + 64;
        r->checks = (Check *)realloc(r->checks, sizeof(Check) * (size_t)r->room);
        if (!r->checks) die("out of memory for the report");
    }
    Check *c = &r->checks[r->count++];
    snprintf(c->name, sizeof(c->name), "%s", name);
    c->error = error, c->tolerance = tolerance, c->share = error / tolerance;
    if (!(error <= tolerance)) r->failed++;   // so that NaN fails
}

// Largest difference relative to the largest magnitude of `want`; extra is allowed on top, in absolute units
static void compare(Report *r, const char *name, const real *got, const double *want, size_t n,
                    double tolerance, double extra) {
    double most = 0, error = 0;
    for (size_t i = 0; i < n; i++) {
        if (isfinite(want[i])) {
            worsens(&most, fabs(want[i]));
            worsens(&error, fabs((double)got[i] - want[i]));
        } else if (isnan(want[i]) ? !isnan(got[i]) : (double)got[i] != want[i])
            error = NAN;   // exactly, or not at all
    }
    if (r->override_tolerance > 0) tolerance = r->override_tolerance, extra = 0;
    report_add(r, name, error, tolerance * most + extra + 1e-300);
}

static double *want_read(const SafeFile *f, const char *name, size_t n) {
    const SafeTensor *t = safe_find(f, name);
    if (!t) return NULL;
    if (safe_elements(t) != n)
        die("%s: tensor %s: %zu elements where %zu are expected", f->path, name, safe_elements(t), n);
    double *out = (double *)alloc_zero(n, sizeof(double));
    for (size_t i = 0; i < n; i++) out[i] = element(safe_data(f, t), t->type, i);
    return out;
}

// Compares tensor `name` of the file, if it is there, with what was computed
static void compare_named(Report *r, const SafeFile *f, const char *name, const real *got, size_t n,
                          double tolerance, double extra) {
    double *want = want_read(f, name, n);
    if (want) compare(r, name, got, want, n, tolerance, extra);
    free(want);
}

// Compares a tensor after k steps. A gradient that is off by `noise` of its largest element moves its
// parameter by as much of lr as it is of the gradient itself, which AdamW divides by: an element that noise
// alone makes (keys' bias without QK-norm, say, whose gradient is 0 by softmax's invariance) goes either way.
// Muon's polynomial multiplies noise by up to 3.4445^5 = 485 where a singular value is near 0.
static void compare_stepped(Report *r, const SafeFile *f, const char *name, const Tensor *p, const real *got,
                            const Config *c, int k, double tolerance, double noise) {
    char full[96];
    size_t n = p->size;
    double muon = p->muon_parts ? c->muon_lr * fmin(1, 485 * noise) : 0;
    snprintf(full, sizeof(full), "grad.%s", p->name);
    double *want = want_read(f, name, n), *grad = want_read(f, full, n), most = 0, steepest = 0;
    double worst_error = 0, worst_allowed = 1;
    if (!want || !grad || r->override_tolerance > 0) {
        if (want) compare(r, name, got, want, n, tolerance, 0);
        free(want), free(grad);
        return;
    }
    for (size_t i = 0; i < n; i++) worsens(&most, fabs(want[i])), worsens(&steepest, fabs(grad[i]));
    for (size_t i = 0; i < n; i++) {
        double error = fabs((double)got[i] - want[i]);
        double turned = fmin(2, 2 * noise * steepest / (fabs(grad[i]) + c->eps));
        double allowed = tolerance * most + k * (muon > 0 ? muon : c->lr * turned) + 1e-300;
        if (!(error / allowed <= worst_error / worst_allowed)) worst_error = error, worst_allowed = allowed;
        if (isnan(error)) break;
    }
    report_add(r, name, worst_error, worst_allowed);
    free(want), free(grad);
}

static void need(real *out, const SafeFile *f, const char *name, size_t n) {
    double *x = want_read(f, name, n);
    if (!x) die("%s: tensor %s is missing", f->path, name);
    for (size_t i = 0; i < n; i++) out[i] = (real)x[i];
    free(x);
}
static void need_int(int *out, const SafeFile *f, const char *name, size_t n, int low, int high) {
    double *x = want_read(f, name, n);
    if (!x) die("%s: tensor %s is missing", f->path, name);
    for (size_t i = 0; i < n; i++) {
        if (!(x[i] >= low && x[i] <= high))
            die("%s: tensor %s: %g is not from %d to %d", f->path, name, x[i], low, high);
        out[i] = (int)x[i];
    }
    free(x);
}
static int batch_of(const SafeFile *f, const char *name) {
    const SafeTensor *t = safe_find(f, name);
    if (!t->ndim || !t->shape[0] || t->shape[0] > 100000 || !safe_elements(t))
        die("%s: tensor %s: no usable batch", f->path, name);
    return (int)t->shape[0];
}
static int named_in(const char *list, const char *name) {
    size_t n = strlen(name);
    for (const char *at = list; at && (at = strstr(at, name)); at += n)
        if ((at == list || strchr(", ", at[-1])) && (!at[n] || strchr(", ", at[n]))) return 1;
    return 0;
}

// Tolerances. Double: the format's 1e-9. Float: errors grow with the length of the sums and the depth; over
// the cases of dev/ref and random ones of `dev/reference.py random`, 2000 epsilons (2.4e-4) of the largest
// element hold everywhere (of 2600 random files one needs more than 1000: both sides compute in float). A
// scalar has no larger element beside it, and its terms may cancel: in float the gradients of the blocks'
// lambdas are measured as one tensor. Parameters after a step: compare_stepped.
static double tolerance_of(void) { return sizeof(real) == 8 ? 1e-9 : 2000 * REAL_EPS; }

// Immiscible noise: in.noise is of in.noise_candidates [k,B,C,S,S] the nearest to in.x, the first of equals
static void replay_candidates(Report *r, const SafeFile *f, const Config *c, const Batch *batch) {
    size_t latent = (size_t)latent_of(c), B = (size_t)batch->B, all = B * latent, k = (size_t)c->immiscible;
    double *candidates = k > 1 ? want_read(f, "in.noise_candidates", k * all) : NULL;
    if (!candidates) return;
    real *candidate = (real *)alloc_zero(latent, sizeof(real));
    double *noise = (double *)alloc_zero(all, sizeof(double));
    for (size_t b = 0; b < B; b++) {
        double least = INFINITY;
        for (size_t j = 0; j < k; j++) {
            const double *one = candidates + j * all + b * latent;
            for (size_t i = 0; i < latent; i++) candidate[i] = (real)one[i];
            double far = square_distance(candidate, batch->x + b * latent, latent);
            if (far < least) least = far, memcpy(noise + b * latent, one, latent * sizeof(double));
        }
    }
    compare(r, "in.noise", batch->noise, noise, all, tolerance_of(), 0);
    free(candidates), free(candidate), free(noise);
}

static void replay_training(Report *r, const SafeFile *f, Model *m) {
    const Config *c = &m->c;
    int B = batch_of(f, "in.x"), steps = (int)safe_whole(f, "steps", 0, 1000, 0);
    size_t b = (size_t)B, latent = (size_t)latent_of(c), Z = (size_t)c->z_dim, T = (size_t)tokens_of(c);
    const char *skip = safe_metadata(f, "no_gradient");
    double tol = tolerance_of();
    Batch *batch = batch_create(c, B);
    need(batch->x, f, "in.x", b * latent), need(batch->noise, f, "in.noise", b * latent);
    replay_candidates(r, f, c, batch);
    for (size_t i = 0; i < latent; i++)
        batch->v_before[i] = batch->noise[(b - 1) * latent + i] - batch->x[(b - 1) * latent + i];
    if (c->cls) need(batch->cls, f, "in.cls", b * Z), need(batch->noise_cls, f, "in.noise_cls", b * Z);
    if (c->align) need(batch->feats, f, "in.feats", b * T * Z);
    double *t = want_read(f, "in.t", b);
    if (!t) die("%s: tensor in.t is missing", f->path);
    for (int i = 0; i < B; i++) batch->t[i] = (real)shift_time(c, t[i]);
    free(t);
    need_int(batch->y, f, "in.y", b, 0, c->num_classes);
    int *drop = (int *)alloc_zero(b, sizeof(int)), path_drop = 0;
    if (safe_find(f, "in.drop")) need_int(drop, f, "in.drop", b, 0, 1);
    for (int i = 0; i < B; i++)
        if (drop[i]) batch->y[i] = c->num_classes;
    free(drop);
    for (size_t i = 0; i < b * T; i++) batch->ids[i] = (int)(i % T);
    if (c->routing && safe_find(f, "in.ids_keep"))
        need_int(batch->ids, f, "in.ids_keep", b * (size_t)kept_of(c), 0, (int)T - 1);
    else if (kept_of(c) < (int)T) die("%s: tensor in.ids_keep is missing", f->path);
    if (safe_find(f, "in.path_drop")) need_int(&path_drop, f, "in.path_drop", 1, 0, 1);

    // Sparse blocks on a path-drop step: what they computed before it was discarded
    for (int dropped = path_drop; dropped >= 0; dropped--) {
        batch->path_drop = dropped ? 0 : path_drop;
        backend->zero_gradients(m);
        backend->read_losses(m);
        backend->forward_backward(m, batch);
        ActivationNames names = activation_names(c);
        for (int i = 0; i < names.count; i++) {
            const ActivationName *one = &names.of[i];
            char full[80];
            if (dropped ? !one->sparse : one->sparse && path_drop) continue;
            snprintf(full, sizeof(full), "act.%s", one->name);
            compare_named(r, f, full, backend->activation(m, one->name), b * one->size, tol, 0);
        }
    }
    Losses sum = backend->read_losses(m);
    real losses[5] = {(real)sum.denoise, (real)sum.cls, (real)sum.align, (real)sum.cfm, (real)sum.total};
    static const char *const names[] = {"loss.denoise", "loss.cls", "loss.proj", "loss.cfm", "loss.total"};
    // In float a loss may be small because its terms cancel: their rounding does not
    double cancelled = sizeof(real) == 8 ? 0 : 0.1 * tol;
    for (int i = 0; i < 5; i++) compare_named(r, f, names[i], &losses[i], 1, tol, cancelled);

    real *host = (real *)alloc_zero(m->table.total, sizeof(real));
    backend->get_block(host, m, GRADS);
    double lambdas = 0;   // the largest of their gradients
    for (int i = 0; i < m->table.count; i++) {
        char name[96];
        snprintf(name, sizeof(name), "grad.%s", m->table.tensors[i].name);
        double *one = m->table.tensors[i].ndim ? NULL : want_read(f, name, 1);
        if (one) worsens(&lambdas, fabs(*one));
        free(one);
    }
    for (int i = 0; i < m->table.count; i++) {
        const Tensor *p = &m->table.tensors[i];
        char name[96];
        snprintf(name, sizeof(name), "grad.%s", p->name);
        double lambda = sizeof(real) == 4 && p->ndim == 0 ? tol * lambdas : 0;
        if (p->trained) compare_named(r, f, name, host + p->offset, p->size, tol, lambda);
    }
    for (int k = 1; k <= steps; k++) {
        if (k > 1) backend->zero_gradients(m), backend->forward_backward(m, batch);
        backend->update(m, k);
        real norm = (real)backend->read_losses(m).grad_norm;
        if (k == 1) compare_named(r, f, "grad_norm", &norm, 1, tol, 0);
        for (int e = 0; e < 2; e++) {
            backend->get_block(host, m, e ? EMA : PARAMS);
            for (int i = 0; i < m->table.count; i++) {
                const Tensor *p = &m->table.tensors[i];
                char name[96];
                snprintf(name, sizeof(name), "%s%d.%s", e ? "ema" : "after", k, p->name);
                if (!named_in(skip, p->name))
                    compare_stepped(r, f, name, p, host + p->offset, c, k, tol,
                                    sizeof(real) == 8 ? 1e-12 : tol);
            }
        }
    }
    free(host);
    batch_free(batch);
}

static void replay_evaluation(Report *r, const SafeFile *f, Model *m) {
    const Config *c = &m->c;
    int B = batch_of(f, "eval.x_t");
    size_t b = (size_t)B, latent = b * (size_t)latent_of(c), Z = b * (size_t)c->z_dim;
    SamplerWork w = sampler_work(c, B);
    need(w.x, f, "eval.x_t", latent), need(w.t, f, "eval.t", b),
        need_int(w.y, f, "eval.y", b, 0, c->num_classes);
    if (c->cls) need(w.cls, f, "eval.cls_t", Z);
    for (int uncond = 0; uncond < 2; uncond++) {
        backend->velocity(m, w.v[0], w.v_cls[0], w.x, w.cls, w.t, uncond ? w.no_class : w.y, 0, uncond, B);
        compare_named(r, f, uncond ? "eval.v_uncond" : "eval.v", w.v[0], latent, tolerance_of(), 0);
        if (c->cls)
            compare_named(r, f, uncond ? "eval.v_cls_uncond" : "eval.v_cls", w.v_cls[0], Z, tolerance_of(),
                          0);
    }
    sampler_work_free(&w);
}

static void replay_sampling(Report *r, const SafeFile *f, Model *m) {
    const Config *c = &m->c;
    int B = batch_of(f, "sample.latents");
    size_t b = (size_t)B, latent = b * (size_t)latent_of(c), Z = b * (size_t)c->z_dim;
    Sampling s = sampling_default();
    s.steps = (int)safe_whole(f, "sample_steps", 1, 1e6, 50), s.use_ema = 0;
    s.cfg = safe_number(f, "sample_cfg_scale", 1), s.cls_cfg = safe_number(f, "sample_cls_cfg_scale", 0);
    s.low = safe_number(f, "sample_guidance_low", 0), s.high = safe_number(f, "sample_guidance_high", 1);
    s.path_drop = (int)safe_whole(f, "sample_path_drop", 0, 1, 0);
    double *x = want_read(f, "sample.latents", latent),
           *cls = c->cls ? want_read(f, "sample.cls_latents", Z) : NULL;
    double *eps = want_read(f, "sample.eps", latent * (size_t)(s.steps - 1));
    double *cls_eps = c->cls ? want_read(f, "sample.cls_eps", Z * (size_t)(s.steps - 1)) : eps;
    if (!eps || !cls_eps || (c->cls && !cls)) die("%s: a tensor sample.* is missing", f->path);
    s.eps = eps, s.cls_eps = cls_eps;
    int *y = (int *)alloc_zero(b, sizeof(int));
    need_int(y, f, "sample.y", b, 0, c->num_classes);
    sample_euler_maruyama(x, cls, backend, m, &s, y, B, NULL, NULL);
    real *out = (real *)alloc_zero(latent, sizeof(real));
    for (size_t i = 0; i < latent; i++) out[i] = (real)x[i];
    compare_named(r, f, "sample.out", out, latent, tolerance_of(), 0);
    free(x), free(cls), free(eps), free(y), free(out);
    if (c->cls) free(cls_eps);
}

// The configuration of a reference file. What came after the paper is said there in words of its own: which
// tensors are Muon's is part of the optimizer's name, AdamW's eps has another one beside Muon, and each
// block's MLP has its width.
static void reference_config(Config *c, const SafeFile *f) {
    static const char *const optimizers[] = {"adamw", "muon_split", "muon_srdit13"};
    const char *name = safe_metadata(f, "optimizer"), *widths = safe_metadata(f, "mlp_widths");
    int k = 0, count = 0;
    while (name && k < 3 && strcmp(name, optimizers[k])) k++;
    if (k == 3)
        die("%s: optimizer is %s, which is none of adamw, muon_split and muon_srdit13", f->path, name);
    c->optimizer = k ? MUON : ADAMW;
    c->muon = k == 2 ? SRDIT13 : SPLIT;
    if (k && safe_number(f, "muon_steps", 5) != 5)
        die("%s: muon_steps is %g, but the trainer makes 5", f->path, safe_number(f, "muon_steps", 5));
    for (const char *at = widths; at; at = strchr(at, ','), at += at != NULL, count++) {
        char *end;
        long width = strtol(at, &end, 10);
        if (*at < '0' || *at > '9' || (*end && *end != ',') || width < 1 || width > 1 << 20 ||
            count == MAX_DEPTH)
            die("%s: mlp_widths is \"%s\"; it must be whole numbers from 1 to 1048576, one a block", f->path,
                widths);
        c->hidden[count] = (int)width;
    }
    // what they replace may stand beside them with any value
    const char *except[] = {
        "optimizer", "muon", "mlp_widths", k ? "eps" : "mlp_widths", count ? "mlp_ratio" : "mlp_widths",
        NULL};
    config_read(c, f, except);
    if (count && count != c->depth)
        die("%s: mlp_widths has %d numbers for %d blocks", f->path, count, c->depth);
    OptionTable t = config_table(c);
    if (k && safe_metadata(f, "adamw_eps"))
        option_set(&t, option_find(&t, "eps"), safe_number(f, "adamw_eps", 0), f->path, "adamw_eps");
}

static void replay_sit(Report *r, const SafeFile *f) {
    Config c = config_default();
    reference_config(&c, f);
    int B = 1;
    static const char *const inputs[] = {"in.x", "eval.x_t", "sample.latents"};
    for (int i = 0; i < 3; i++)
        if (safe_find(f, inputs[i])) B = imax(B, batch_of(f, inputs[i]));
    Params unused;   // what the file does not hold is refused before memory is taken for it
    Table table = params_table(&unused, &c, NULL);
    for (int i = 0; i < table.count; i++) {
        char name[96];
        snprintf(name, sizeof(name), "param.%s", table.tensors[i].name);
        const SafeTensor *t = safe_find(f, name);
        if (table.tensors[i].trained && (!t || safe_elements(t) != table.tensors[i].size))
            die("%s: tensor %s is missing, or its size is not that of the model in the metadata", f->path,
                name);
    }
    free(table.tensors);
    Model *m = backend->create(&c, B, 1);
    real *own = (real *)alloc_zero(m->table.total, sizeof(real)),
         *given = (real *)alloc_zero(m->table.total, sizeof(real));
    backend->get_block(own, m, PARAMS);
    for (int i = 0; i < m->table.count; i++) {
        const Tensor *t = &m->table.tensors[i];
        char name[96];
        snprintf(name, sizeof(name), "param.%s", t->name);
        memcpy(given + t->offset, own + t->offset, t->size * sizeof(real));
        if (t->trained) need(given + t->offset, f, name, t->size);
        else   // fixed tables: ours against the file's. Positions are stored as floats, and so is what an F32
               // file has.
            compare_named(r, f, name, own + t->offset, t->size,
                          t->start == POSITIONS || sizeof(real) == 4 ? 4e-6 : tolerance_of(), 0);
    }
    backend->put_block(m, given, PARAMS), backend->put_block(m, given, EMA);
    if (safe_find(f, "eval.x_t")) replay_evaluation(r, f, m);
    if (safe_find(f, "sample.latents")) replay_sampling(r, f, m);
    if (safe_find(f, "in.x")) replay_training(r, f, m);
    free(own), free(given);
    backend->destroy(m);
}

// A decoder file: latents to an image, and to bytes
static void replay_decoder(Report *r, const SafeFile *f) {
    Decoder *d = decoder_open(f, "param.");
    const SafeTensor *in = safe_find(f, "in.z");
    if (!in || in->ndim != 4 || !safe_elements(in) || in->shape[0] > 1000 || in->shape[2] > 1000 ||
        in->shape[3] > 1000)
        die("%s: tensor in.z is missing or has no usable size", f->path);
    int B = (int)in->shape[0], h = (int)in->shape[2], w = (int)in->shape[3], k = decoder_factor(d);
    size_t H = (size_t)(h * k), W = (size_t)(w * k), ch = (size_t)d->out_ch, n = (size_t)B * ch * H * W;
    real *z = (real *)alloc_zero(safe_elements(in), sizeof(real)),
         *image = (real *)alloc_zero(n, sizeof(real));
    real *bytes = (real *)alloc_zero(n, sizeof(real));
    need(z, f, "in.z", (size_t)(B * d->z * h * w));
    decoder_decode(image, d, z, B, h, w);
    compare_named(r, f, "out.image", image, n, tolerance_of(), 0);
    for (size_t i = 0; i < n;
         i++)   // [B,3,H,W] to bytes [B,H,W,3]; truncating may turn a rounding into one step
        bytes[((i / (ch * H * W) * H + i / W % H) * W + i % W) * ch + i / (H * W) % ch] = pixel_of(image[i]);
    double override_tolerance = r->override_tolerance;
    r->override_tolerance = 0;
    compare_named(r, f, "out.pixels", bytes, n, 0, sizeof(real) == 8 ? 0 : 1);
    r->override_tolerance = override_tolerance;
    free(z), free(image), free(bytes), decoder_close(d);
}

static int worst_first(const void *a, const void *b) {
    double x = ((const Check *)a)->share, y = ((const Check *)b)->share;
    if (isnan(x) || isnan(y)) return isnan(y) - isnan(x);
    return x < y ? 1 : x > y ? -1 : strcmp(((const Check *)a)->name, ((const Check *)b)->name);
}

// Replays one reference file and prints its tensors, worst first (`most` of them, and all that are off)
static void replay(const char *path, double override_tolerance, int most) {
    Report r;
    memset(&r, 0, sizeof(r));
    r.override_tolerance = override_tolerance;
    SafeFile *f = safe_open(path);
    const char *format = safe_metadata(f, "format"), *kind = safe_metadata(f, "kind");
    if (!format || strcmp(format, "srdit-ref-1"))
        die("%s: not a reference file: its format is not srdit-ref-1", path);
    if (kind && !strcmp(kind, "invae")) replay_decoder(&r, f);
    else replay_sit(&r, f);
    if (r.count) qsort(r.checks, (size_t)r.count, sizeof(Check), worst_first);
    const Check nothing = {"nothing to compare", NAN, 0, NAN}, *worst = r.count ? r.checks : &nothing;
    char name[64];
    const char *slash = strrchr(path, '/');
    snprintf(name, sizeof(name), "replay %s", slash ? slash + 1 : path);
    result(!r.failed && r.count, name, "%s, %d tensors, %d off; worst %s at %.3f of its tolerance %.1e",
           precision, r.count, r.failed, worst->name, worst->share, worst->tolerance);
    for (int i = 0; i < r.count && (i < most || !(r.checks[i].share <= 1)); i++)
        printf("     %-48s error %9.2e  allowed %9.2e  share %7.3f%s\n", r.checks[i].name, r.checks[i].error,
               r.checks[i].tolerance, r.checks[i].share, r.checks[i].share <= 1 ? "" : "  <-- off");
    free(r.checks), safe_close(f);
}

// ----------------------------------------------------------------------------------------------------------
// Models and batches with random numbers everywhere: at the model's own start the gates are zero, most
// gradients vanish, and a wrong attention would pass

static void switch_off(Config *c, const char *technique) {
    OptionTable t = config_table(c);
    option_set(&t, option_find(&t, technique), 0, "test", technique);
}
static Config small_config(void) {
    Config c = config_default();
    c.depth = 5, c.hidden_size = 24, c.num_heads = 3, c.patch_size = 2, c.in_channels = 3, c.input_size = 8;
    c.num_classes = 5, c.z_dim = 10, c.projector_dim = 14, c.num_f = 2, c.num_h = 2, c.shift_base = 64;
    return c;
}

static void randomize(Model *m, uint64_t seed) {
    real *p = (real *)alloc_zero(m->table.total, sizeof(real));
    backend->get_block(p, m, PARAMS);
    for (int i = 0; i < m->table.count; i++) {
        const Tensor *t = &m->table.tensors[i];
        real *x = p + t->offset;
        if (!t->trained) continue;
        fill_normal(x, t->size, seed, 99, 0, (uint32_t)i);
        real middle = t->start == ONE ? 1 : t->start == HALF ? (real)0.5 : 0;
        real spread = (real)(t->ndim == 2 ? 1 / sqrt((double)t->shape[1]) : 0.2);
        for (size_t k = 0; k < t->size; k++) x[k] = middle + spread * x[k];
    }
    backend->put_block(m, p, PARAMS), backend->put_block(m, p, EMA);
    free(p);
}

// A batch of random data, of samples first ... first+B of `whole`
static Batch *random_batch(const Config *c, int B, int first, int whole, uint64_t seed, int path_drop) {
    Batch *b = batch_create(c, B);
    size_t latent = (size_t)latent_of(c), Z = (size_t)c->z_dim, T = (size_t)tokens_of(c);
    real *before = (real *)alloc_zero(latent, sizeof(real));
    b->first = first, b->whole = whole, b->path_drop = path_drop;
    for (int i = -1; i < B; i++) {
        uint32_t n = (uint32_t)((first + i + whole) % whole);
        size_t k = (size_t)imax(i, 0);
        fill_normal(i < 0 ? before : b->x + k * latent, latent, seed, 100, 0, n);
        fill_normal(i < 0 ? b->v_before : b->noise + k * latent, latent, seed, 101, 0, n);
        if (i < 0) continue;
        fill_normal(b->cls + k * Z, Z, seed, 102, 0, n),
            fill_normal(b->noise_cls + k * Z, Z, seed, 103, 0, n);
        fill_normal(b->feats + k * T * Z, T * Z, seed, 104, 0, n);
        b->t[k] = (real)shift_time(c, uniform(seed, 105, 0, n));
        b->y[k] = (int)(n % (uint32_t)(c->num_classes + 1));
        for (size_t j = 0; j < T; j++) b->ids[k * (size_t)kept_of(c) + j % (size_t)kept_of(c)] = (int)j;
        draw_kept(b->ids + k * (size_t)kept_of(c), (size_t)kept_of(c), T, b->keys, seed, 0, n);
    }
    for (size_t j = 0; j < latent; j++) b->v_before[j] -= before[j];
    free(before);
    return b;
}

static Losses loss_of(Model *m, const Batch *b) {
    backend->zero_gradients(m);
    backend->read_losses(m);
    backend->forward_backward(m, b);
    return backend->read_losses(m);
}

#ifndef ENTRIES
#define ENTRIES 4   // of each tensor, below (make debug: 1, which shows sanitizers as much)
#endif
// Gradients against finite differences of the total loss: entries of every parameter tensor, in double.
// (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h is off by O(h^4) and by rounding over h: some 1e-11 at h =
// 1e-3. Returns the largest difference as a share of what is allowed: 1e-9 where gradients are of the order
// of 1.
static double finite_differences(Config c, int path_drop, char worst[64], int *count) {
    Model *m = backend->create(&c, 3, 1);
    randomize(m, 5);
    Batch *b = random_batch(&c, 3, 0, 3, 6, path_drop);
    real *g = (real *)alloc_zero(m->table.total, sizeof(real));
    loss_of(m, b);
    backend->get_block(g, m, GRADS);
    double most = 0, h = 1e-3;
    *count = 0;
    for (int i = 0; i < m->table.count; i++) {
        const Tensor *t = &m->table.tensors[i];
        if (!t->trained) continue;
        for (uint32_t k = 0; k < ENTRIES && k < t->size; k++) {
            size_t at = t->offset + (t->size <= 4 ? k : draw4(7, 106, (uint32_t)i, k, 0).v[0] % t->size);
            real x = m->params[at];
            double f[5];
            for (int s = -2; s <= 2; s++)
                if (s) m->params[at] = x + (real)(s * h), f[s + 2] = loss_of(m, b).total;
            m->params[at] = x;
            double slope = (8 * (f[3] - f[1]) - (f[4] - f[0])) / (12 * h),
                   error = fabs(slope - (double)g[at]) / 1e-9;
            ++*count;
            if (worsens(&most, error)) snprintf(worst, 64, "%s", t->name);
        }
    }
    free(g), batch_free(b), backend->destroy(m);
    return most;
}

static void test_finite_differences(void) {
    char worst[64] = "", name[96], flag[80];
    int count, threads = omp_get_max_threads();
    omp_set_num_threads(1);   // these models are too small to share out
    double share = finite_differences(small_config(), 0, worst, &count);
    result(share <= 1, "finite differences", "%d entries, of every tensor; worst %s at %.3f of 1e-9", count,
           worst, share);
    share = finite_differences(small_config(), 1, worst, &count);
    result(share <= 1, "finite differences, drop", "path dropped; worst %s at %.3f of 1e-9", worst, share);
    // beyond the paper: alignment in encoder, sparse middle and decoder at once, MLPs of 64 to 192
    for (int drop = 0; drop < 2; drop++) {
        Config c = small_config();
        const double depths[] = {1, 3, 5}, widths[] = {2, 8};
        c.align_depths.count = 3, c.mlp_widths.count = 2;
        memcpy(c.align_depths.x, depths, sizeof(depths)), memcpy(c.mlp_widths.x, widths, sizeof(widths));
        c.depth = 6;   // so that on a path-drop step one sparse block runs and one does not
        share = finite_differences(c, drop, worst, &count);
        result(share <= 1, drop ? "finite differences, 3 depths" : "finite differences, depths",
               "align depths 1, 3 and 5%s; worst %s at %.3f of 1e-9", drop ? ", path dropped" : "", worst,
               share);
    }
    // each technique's switch changes the loss, and its gradients stay right
    for (int i = 0; i < CONFIG_OPTIONS; i++) {
        Config c = small_config(), on = c;
        const Option *f = &config_options[i];
        if (f->kind != TECHNIQUE) continue;
        switch_off(&c, f->name);
        share = finite_differences(c, 0, worst, &count);
        Model *a = backend->create(&on, 3, 1), *b = backend->create(&c, 3, 1);
        Batch *batch_on = random_batch(&on, 3, 0, 3, 6, 0), *batch_off = random_batch(&c, 3, 0, 3, 6, 0);
        randomize(a, 5), randomize(b, 5);
        double with = loss_of(a, batch_on).total, without = loss_of(b, batch_off).total;
        // three act on the draws or on the update, not on the loss of a given batch
        int elsewhere =
            !strcmp(f->name, "path_drop") || !strcmp(f->name, "label_dropout") || !strcmp(f->name, "ema");
        flag_of(flag, f);
        snprintf(name, sizeof(name), "switch %s", flag);
        result(share <= 1 && (elsewhere ? with == without : with != without), name,
               "loss %.6f, without %.6f%s; worst %s at %.3f of 1e-9", with, without,
               elsewhere ? " (acts elsewhere)" : "", worst, share);
        batch_free(batch_on), batch_free(batch_off), backend->destroy(a), backend->destroy(b);
    }
    omp_set_num_threads(threads);
}

// Gradients of one batch of 6 and of the same in 2 or 3 parts, contrastive pairs included
static void test_accumulation(void) {
    Config c = small_config();
    Model *m = backend->create(&c, 6, 1);
    randomize(m, 5);
    size_t n = m->table.total;
    real *whole = (real *)alloc_zero(n, sizeof(real)), *parts = (real *)alloc_zero(n, sizeof(real));
    double loss[3] = {0, 0, 0}, worst = 0;
    for (int k = 1; k <= 3; k++) {
        backend->zero_gradients(m), backend->read_losses(m);
        for (int i = 0; i < k; i++) {
            Batch *b = random_batch(&c, 6 / k, i * 6 / k, 6, 8, 0);
            backend->forward_backward(m, b);
            batch_free(b);
        }
        loss[k - 1] = backend->read_losses(m).total;
        backend->get_block(k == 1 ? whole : parts, m, GRADS);
        for (int i = 0; k > 1 && i < m->table.count; i++) {
            const Tensor *t = &m->table.tensors[i];
            double most = 0, error = 0;
            for (size_t j = t->offset; j < t->offset + t->size; j++) {
                worsens(&most, fabs((double)whole[j]));
                worsens(&error, fabs((double)whole[j] - parts[j]));
            }
            if (error > 0 || isnan(error)) worsens(&worst, error / most);
        }
    }
    double allowed = sizeof(real) == 8 ? 1e-12 : 100 * REAL_EPS;
    result(worst <= allowed && fabs(loss[1] - loss[0]) < allowed * 10 &&
               fabs(loss[2] - loss[0]) < allowed * 10,
           "accumulation", "%s: 1 x 6 = 2 x 3 = 3 x 2, gradients to %.1e (allowed %.1e)", precision, worst,
           allowed);
    free(whole), free(parts), backend->destroy(m);
}

// The solvers on a smooth field in place of the network, dx/dt = x cos(3t) + t: halving the step divides
// Euler's error by about 2, those of Heun and AB2 by about 4.
static void smooth_velocity(Model *m, real *v, real *v_cls, const real *x, const real *cls, const real *t,
                            const int *y, int use_ema, int path_drop, int B) {
    (void)y, (void)use_ema, (void)path_drop;
    size_t latent = (size_t)latent_of(&m->c), Z = (size_t)m->c.z_dim;
    for (size_t i = 0; i < (size_t)B * latent; i++)
        v[i] = x[i] * (real)cos(3 * (double)t[i / latent]) + t[i / latent];
    for (size_t i = 0; i < (size_t)B * Z; i++) v_cls[i] = cls[i] * (real)cos(3 * (double)t[i / Z]) + t[i / Z];
}
static void test_solvers(void) {
    Model stub;
    memset(&stub, 0, sizeof(stub));
    stub.c = small_config();
    Backend field = *backend;
    field.velocity = smooth_velocity;
    size_t latent = (size_t)latent_of(&stub.c), Z = (size_t)stub.c.z_dim;
    double *x = (double *)alloc_zero(latent, sizeof(double)), *cls = (double *)alloc_zero(Z, sizeof(double));
    double ends[3][4], ratio[3][2];
    int y = 0;
    for (int solver = 0; solver < 3; solver++)
        for (int k = 0; k < 4; k++) {   // 40, 80, 160 steps, and the limit
            Sampling s = sampling_default();
            s.steps = k == 3 ? 20000 : 40 << k;
            for (size_t i = 0; i < latent; i++) x[i] = 1;
            for (size_t i = 0; i < Z; i++) cls[i] = 1;
            sample_ode(x, cls, &field, &stub, &s, k == 3 ? HEUN : (enum Solver)solver, &y, 1, NULL, NULL);
            ends[solver][k] = x[0] + cls[0];
        }
    for (int solver = 0; solver < 3; solver++)
        for (int k = 0; k < 2; k++)
            ratio[solver][k] = (ends[solver][k] - ends[solver][3]) / (ends[solver][k + 1] - ends[solver][3]);
    result(fabs(ratio[EULER][1] - 2) < 0.1 && fabs(ratio[HEUN][1] - 4) < 0.3 && fabs(ratio[AB2][1] - 4) < 0.3,
           "ODE solvers",
           "half the step divides the error by %.2f, %.2f (Euler), %.2f, %.2f (Heun), %.2f, %.2f (AB2)",
           ratio[0][0], ratio[0][1], ratio[1][0], ratio[1][1], ratio[2][0], ratio[2][1]);
    free(x), free(cls);
}

// The matrix product against its naive form, all shapes of op, bias and edge; and the same bits for 1 and 3
// threads
static void test_matmul(void) {
    double worst = 0;
    int same = 1, cases = 0, threads = omp_get_max_threads();
    for (uint32_t i = 0; i < 150; i++) {
        Philox r = draw4(11, 107, 0, i, 0);
        // long rows of A^T or B, and sums of several blocks, take paths of their own
        int M = 1 + (int)(r.v[0] % (i % 9 == 3 ? 1300 : 70));
        int N = 1 + (int)(r.v[1] % (i % 9 == 6 ? 1300 : 70)), K = 1 + (int)(r.v[2] % (i % 9 ? 90 : 1300));
        int ta = r.v[3] & 1, tb = r.v[3] >> 1 & 1, add = r.v[3] >> 2 & 1,
            with_bias = !add && (r.v[3] >> 3 & 1);
        size_t m = (size_t)M, n = (size_t)N, k = (size_t)K;
        real *a = (real *)alloc_zero(m * k, sizeof(real)), *b = (real *)alloc_zero(n * k, sizeof(real));
        real *bias = (real *)alloc_zero(n, sizeof(real)), *c[2];
        fill_normal(a, m * k, 12, 1, 0, i), fill_normal(b, n * k, 12, 2, 0, i),
            fill_normal(bias, n, 12, 3, 0, i);
        for (int t = 0; t < 2; t++) {
            c[t] = (real *)alloc_zero(m * n, sizeof(real));
            fill_normal(c[t], m * n, 12, 4, 0, i);
            real *start = (real *)alloc_zero(m * n, sizeof(real));
            memcpy(start, c[t], m * n * sizeof(real));
            omp_set_num_threads(t ? 3 : 1);
            matmul(c[t], a, b, with_bias ? bias : NULL, M, N, K, ta, tb, add);
            for (size_t row = 0; row < m && t == 0 && !ta; row++) {   // by itself: the same bits
                real *alone = (real *)alloc_zero(n, sizeof(real));
                memcpy(alone, start + row * n, n * sizeof(real));
                matmul(alone, a + row * k, b, with_bias ? bias : NULL, 1, N, K, 0, tb, add);
                same &= !memcmp(alone, c[t] + row * n, n * sizeof(real));
                free(alone);
            }
            if (t == 0) matmul_naive(start, a, b, with_bias ? bias : NULL, m, n, k, ta, tb, add);
            for (size_t x = 0; x < m * n && t == 0; x++)
                worsens(&worst, fabs((double)start[x] - c[0][x]) / (4 * REAL_EPS * (K + 4)));
            free(start);
        }
        same &= !memcmp(c[0], c[1], m * n * sizeof(real));
        free(a), free(b), free(bias), free(c[0]), free(c[1]);
        cases++;
    }
    omp_set_num_threads(threads);
    result(worst <= 1 && same, "matrix product",
           "%s: %d random cases, error %.2f of 4 eps (K + 4) against three loops; 1 and 3 threads, rows "
           "alone %s",
           precision, cases, worst, same ? "the same bits" : "DIFFER");
}

#ifdef USE_DOUBLE

void replay_double(const char *path, double tolerance, int most, int counts[2]);
void replay_double(const char *path, double tolerance, int most, int counts[2]) {
    passed = failed = 0;
    replay(path, tolerance, most);
    counts[0] += passed, counts[1] += failed;
}
void tests_double(int counts[2]);
void tests_double(int counts[2]) {
    passed = failed = 0;
    test_matmul();
    test_accumulation();
    test_finite_differences();
    test_solvers();
    counts[0] += passed, counts[1] += failed;
}

#else
void replay_double(const char *path, double tolerance, int most, int counts[2]);
void tests_double(int counts[2]);
#ifndef TEST_CUDA
static int double_counts[2];
#endif

// ----------------------------------------------------------------------------------------------------------
// Random numbers, tables, functions

static void test_random(void) {
    static const uint32_t known[3][10] = {
        // counter, key, output: the Random123 library's known answers
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb,
         0x5001e420, 0x24126ea1}};
    int good = 1;
    for (int i = 0; i < 3; i++) {
        const uint32_t *k = known[i];
        Philox r = philox((uint64_t)k[5] << 32 | k[4], k[0], k[1], k[2], k[3]);
        good &= !memcmp(r.v, k + 6, 16);
    }
    result(good, "Philox", "three known answers");

    good = 1;
    for (uint32_t n = 1; n < 3000; n += n < 20 ? 1 : 331) {
        char *seen = (char *)alloc_zero(n, 1);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t at = permuted(i, n, 3, STREAM_ORDER, 1);
            good &= at < n && !seen[at];
            if (at < n) seen[at] = 1;
        }
        free(seen);
    }
    result(good, "data order", "every sample once an epoch, for many sizes");

    enum { N = 100000 };
    real *z = (real *)alloc_zero(N, sizeof(real));
    fill_normal(z, N, 1, 2, 3, 4);
    double mean = 0, square = 0, fourth = 0;
    for (int i = 0; i < N; i++) mean += z[i], square += (double)z[i] * z[i], fourth += pow(z[i], 4);
    mean /= N, square /= N, fourth /= N;   // 4.4 standard errors each
    result(fabs(mean) < 0.014 && fabs(square - 1) < 0.02 && fabs(fourth - 3) < 0.14, "normal draws",
           "mean %.4f, variance %.4f, fourth moment %.3f", mean, square, fourth);
    free(z);

    int count[65] = {0}, ids[16];
    uint64_t keys[65];
    good = 1;
    for (uint32_t s = 0; s < 4000; s++) {
        draw_kept(ids, 16, 65, keys, 9, 0, s);
        for (int i = 0; i < 16; i++) {
            good &= ids[i] >= 0 && ids[i] < 65 && (!i || ids[i] > ids[i - 1]);
            count[ids[i]]++;
        }
    }
    double most = 0;   // each token is kept with probability 16/65: standard deviation 27 of 985
    for (int i = 0; i < 65; i++) most = fmax(most, fabs(count[i] - 4000 * 16 / 65.0));
    result(good && most < 27.3 * 4.4, "routing",
           "16 of 65 tokens, distinct, in order, CLS too; count off by at most %.0f", most);
}

// What a step is given: the same however the batch is split, with the right neighbour, shares and streams
static void test_batches(void) {
    char *path[] = {(char *)"data/digits.safetensors"};
    Data *d = data_open(path, 1);
    Config c = config_default();
    model_preset(&c, "nano");
    c.in_channels = d->C, c.input_size = d->S, c.num_classes = d->K, c.z_dim = d->Z;
    c.shift_base = 16;   // s = 2
    size_t latent = (size_t)latent_of(&c), Z = (size_t)c.z_dim, Tk = (size_t)kept_of(&c);
    Batch *whole = batch_create(&c, 12), *part = batch_create(&c, 4), *one = batch_create(&c, 1);
    int good = 1;
    batch_load(whole, d, &c, 7, 3, 0, 12);
    for (size_t k = 0; k < 3; k++) {
        size_t before = (4 * k + 11) % 12;
        batch_load(part, d, &c, 7, 3, (int)(4 * k), 12);
        good &= !memcmp(part->x, whole->x + 4 * k * latent, 4 * latent * sizeof(real));
        good &= !memcmp(part->noise, whole->noise + 4 * k * latent, 4 * latent * sizeof(real));
        good &= !memcmp(part->noise_cls, whole->noise_cls + 4 * k * Z, 4 * Z * sizeof(real));
        good &= !memcmp(part->t, whole->t + 4 * k, 4 * sizeof(real));
        good &= !memcmp(part->y, whole->y + 4 * k, 4 * sizeof(int));
        good &= !memcmp(part->ids, whole->ids + 4 * k * Tk, 4 * Tk * sizeof(int));
        for (size_t i = 0; i < latent; i++)
            good &= part->v_before[i] == whole->noise[before * latent + i] - whole->x[before * latent + i];
    }
    int dropped = 0, paths = 0, steps = (int)d->count, apart = 0, wrong = 0;
    double t = 0;
    real *x = (real *)alloc_zero(latent, sizeof(real));
    for (int step = 0; step < 2 * steps; step++) {
        batch_load(one, d, &c, 7, step, 0, 1);
        t += (double)one->t[0] / (2 * steps);
        dropped += one->y[0] == c.num_classes, paths += one->path_drop;
        int label;
        size_t at =
            permuted((uint32_t)(step % steps), (uint32_t)steps, 7, STREAM_ORDER, (uint32_t)(step / steps));
        data_sample(d, at, x, &label, NULL, NULL, 0);
        wrong +=
            memcmp(x, one->x, latent * sizeof(real)) || (one->y[0] != c.num_classes && one->y[0] != label);
        apart +=
            at != permuted((uint32_t)(step % steps), (uint32_t)steps, 7, STREAM_ORDER, 0) && step >= steps;
        wrong += one->noise[0] == one->noise_cls[0];
    }
    // 2874 steps: standard deviations 16 of 287, 12 of 144, and 0.005 of the mean of t, 2 (1 - ln 2) at s = 2
    result(good && !wrong && apart > steps / 2 && abs(dropped - 287) < 71 && abs(paths - 144) < 52 &&
               fabs(t - 0.6137) < 0.023,
           "batches",
           "split alike; neighbours right; %d labels, %d paths dropped of %d; mean t %.3f; epochs differ",
           dropped, paths, 2 * steps, t);
    free(x), batch_free(whole), batch_free(part), batch_free(one), data_close(d);
}

// Immiscible noise: of the candidates, drawn here side by side, the nearest, for every sample and for the one
// before a part; one candidate is the plain noise; and all of it is the same however a batch is split.
static void test_immiscible(void) {
    enum { B = 12, CANDIDATES = 8 };
    char *path[] = {(char *)"data/digits.safetensors"};
    Data *d = data_open(path, 1);
    Config plain = config_default();
    model_preset(&plain, "nano");
    plain.in_channels = d->C, plain.input_size = d->S, plain.num_classes = d->K, plain.z_dim = d->Z;
    Config c = plain;
    c.immiscible = CANDIDATES;
    size_t latent = (size_t)latent_of(&c);
    Batch *whole = batch_create(&c, B), *part = batch_create(&c, 4), *before = batch_create(&plain, B);
    real *candidate = (real *)alloc_zero(latent, sizeof(real));
    int wrong = 0, other = 0;
    double near = 0, far = 0;
    batch_load(whole, d, &c, 7, 3, 0, B);
    batch_load(before, d, &plain, 7, 3, 0, B);
    for (size_t b = 0; b < B; b++) {
        const real *x = whole->x + b * latent, *noise = whole->noise + b * latent;
        double distance[CANDIDATES] = {0}, chosen = 0;
        int found = -1;
        for (int k = 0; k < CANDIDATES; k++) {
            fill_normal(candidate, latent, 7,
                        k ? (uint32_t)(STREAM_CANDIDATE + k - 1) : (uint32_t)STREAM_NOISE, 3, (uint32_t)b);
            for (size_t i = 0; i < latent; i++) distance[k] += pow((double)candidate[i] - x[i], 2);
            if (!memcmp(candidate, noise, latent * sizeof(real))) found = k, chosen = distance[k];
        }
        wrong += found < 0;
        for (int k = 0; k < CANDIDATES; k++) wrong += !(chosen <= distance[k]);
        other += found > 0, near += chosen, far += distance[0];
        fill_normal(candidate, latent, 7, STREAM_NOISE, 3, (uint32_t)b);
        wrong += memcmp(candidate, before->noise + b * latent, latent * sizeof(real)) != 0;
    }
    wrong += memcmp(whole->noise_cls, before->noise_cls, B * (size_t)c.z_dim * sizeof(real)) != 0;
    for (int k = 0; k < 3; k++) {
        size_t last = (size_t)(4 * k + B - 1) % B;
        batch_load(part, d, &c, 7, 3, 4 * k, B);
        wrong += memcmp(part->noise, whole->noise + (size_t)(4 * k) * latent, 4 * latent * sizeof(real)) != 0;
        for (size_t i = 0; i < latent; i++)
            wrong += part->v_before[i] != whole->noise[last * latent + i] - whole->x[last * latent + i];
    }
    result(!wrong && other >= B / 2 && near < far, "immiscible noise",
           "the nearest of %d for all of %d samples, %d of them not the first; |noise - x|^2 %.3f of plain",
           CANDIDATES, B, other, near / far);
    free(candidate), batch_free(whole), batch_free(part), batch_free(before), data_close(d);
}

// Muon's polynomial drives singular values to 1: of a matrix U S V^T made from known ones, all of what it
// makes are in the band that the polynomial has for them, lying, standing and square, in both forms.
static double poly_of(double s) {
    for (int k = 0; k < 5; k++)
        s = muon_classic[0] * s + muon_classic[1] * pow(s, 3) + muon_classic[2] * pow(s, 5);
    return s;
}
static void test_newton_schulz(void) {
    enum { M = 24, MOST = 96 };
    const size_t sides[] = {24, 32, 48, 96};   // the first two by the plain form, the others by Gram's
    double worst = 0;
    real *v = (real *)alloc_zero(2 * MOST, sizeof(real)), *X = (real *)alloc_zero(M * MOST, sizeof(real)),
         *work = (real *)alloc_zero(M * MOST + 4 * M * M, sizeof(real));
    for (int side = 0; side < 4; side++) {
        size_t n = sides[side];
        // reflections H = I - 2 v v^T / |v|^2 turn diag(S) into H_u S H_v
        fill_normal(v, M, 3, 107, 0, 1), fill_normal(v + MOST, n, 3, 107, 0, 2);
        const real *u = v, *w = v + MOST;
        double uu = 0, ww = 0, s[M];
        for (size_t i = 0; i < M; i++) s[i] = pow(10, -3.0 * (double)i / (M - 1)), uu += (double)u[i] * u[i];
        for (size_t j = 0; j < n; j++) ww += (double)w[j] * w[j];
        for (int turn = 0; turn < 2; turn++) {   // what goes in, then what must come out
            for (size_t i = 0; i < M; i++)
                for (size_t j = 0; j < n; j++) {
                    double sum = 0;
                    for (size_t k = 0; k < M; k++)
                        sum += ((i == k) - 2 * u[i] * u[k] / uu) * (turn ? poly_of(s[k]) : s[k]) *
                               ((j == k) - 2 * w[j] * w[k] / ww);
                    if (turn) worsens(&worst, fabs(sum - X[i * n + j]));
                    else X[i * n + j] = (real)sum;
                }
            if (!turn) newton_schulz(X, work, muon_classic, M, n);
        }
    }
    double allowed = 485 * 20 * REAL_EPS;   // errors grow by at most 3.4445^5
    result(worst <= allowed, "Newton-Schulz",
           "%s: 24 x 24 ... 96, condition 1000: off by %.1e (allowed %.1e)", precision, worst, allowed);
    free(v), free(X), free(work);
}

// What is read ahead by a thread is what is loaded when it is asked for, part after part; and samples as
// stored are, converted, the samples
static void test_loader(void) {
    char *path[] = {(char *)"data/digits.safetensors"};
    Data *d = data_open(path, 1);
    Config c = config_default();
    model_preset(&c, "nano");
    c.in_channels = d->C, c.input_size = d->S, c.num_classes = d->K, c.z_dim = d->Z;
    size_t latent = (size_t)latent_of(&c), of_feats = (size_t)(tokens_of(&c) * c.z_dim), B = 4;
    Batch *one = batch_create(&c, (int)B);
    int wrong = 0, parts = 0;
    for (int ahead = 0; ahead < 2; ahead++)
        for (int last = 6; last <= 40; last += 17) {
            Loader l;
            memset(&l, 0, sizeof(l));
            l.data = d, l.c = &c, l.seed = 7, l.parts = 3, l.whole = 12;
            for (int i = 0; i <= ahead; i++) l.batch[i] = batch_create(&c, (int)B);
            loader_start(&l, 6, last);
            for (int part = 6; part < last; part++, parts++) {
                Batch *b = loader_next(&l);
                loader_ask(&l);   // the other buffer's turn
                batch_load(one, d, &c, 7, part / 3, part % 3 * (int)B, 12);
                wrong += b->step != one->step || b->first != one->first || b->path_drop != one->path_drop;
                wrong += memcmp(b->x, one->x, B * latent * sizeof(real)) != 0;
                wrong += memcmp(b->noise, one->noise, B * latent * sizeof(real)) != 0;
                wrong += memcmp(b->feats, one->feats, B * of_feats * sizeof(real)) != 0;
            }
            loader_stop(&l);
            for (int i = 0; i <= ahead; i++) batch_free(l.batch[i]);
        }
    Batch stored;
    memset(&stored, 0, sizeof(stored));
    stored.B = (int)B, stored.on_device = stored.stored = 1;
    stored.x_type = d->latent_type, stored.feats_type = d->feat_type;
    stored.t = one->t, stored.y = one->y, stored.cls = one->noise_cls;   // (not compared here)
    stored.x_stored = alloc_zero(1 + B, latent * 8), stored.feats_stored = alloc_zero(B, of_feats * 8);
    real *x = (real *)alloc_zero((1 + B) * latent, sizeof(real)),
         *feats = (real *)alloc_zero(B, of_feats * 8);
    batch_load(&stored, d, &c, 7, 5, 8, 12);
    elements_read(x, stored.x_stored, stored.x_type, 0, (1 + B) * latent, d->scale, d->offset);
    elements_read(feats, stored.feats_stored, stored.feats_type, 0, B * of_feats, 1, 0);
    batch_load(one, d, &c, 7, 5, 8, 12);
    int apart = memcmp(x + latent, one->x, B * latent * sizeof(real)) != 0;
    apart += memcmp(feats, one->feats, B * of_feats * sizeof(real)) != 0;
    for (size_t i = 0; i < latent; i++) apart += one->noise_before[i] - x[i] != one->v_before[i];
    result(!wrong && !apart, "loader", "%d parts read ahead or not, %d wrong; as stored: %s", parts, wrong,
           apart ? "OTHERS" : "the same");
    free(x), free(feats), free(stored.x_stored), free(stored.feats_stored), batch_free(one), data_close(d);
}

// The value of --tolerance, which is argument i
static double tolerance_after(int argc, char **argv, int i) {
    if (i + 1 >= argc) die("--tolerance needs a value");
    double tolerance = text_number(argv[i + 1], "command line", "--tolerance");
    if (!(tolerance > 0 && tolerance < INFINITY))
        die("--tolerance is %g, which is not a finite number above 0", tolerance);
    return tolerance;
}

static double ulps(double got, double want) {
    int e;
    frexp(want, &e);
    return fabs(got - want) / ldexp(1, (e < -125 ? -125 : e) - 24);
}
static void test_functions(void) {
    double worst[3] = {0, 0, 0};
    for (uint32_t bits = 0; bits < 0xffffff00u; bits += 977) {
        float x;
        memcpy(&x, &bits, 4);
        if (fabsf(x) < 80 && fabsf(x) > 1e-30f) worsens(&worst[0], ulps(fast_exp(x), exp((double)x)));
    }
    // GELU against its form with tanh, x/2 (1 + tanh u); its rounding is that of x, of the slope that of 1
    enum { COUNT = 1 << 16 };
    real *x = (real *)alloc_zero(4 * COUNT, sizeof(real));
    real *y = x + COUNT, *one = y + COUNT, *slope = one + COUNT;
    for (int i = 0; i < COUNT; i++) x[i] = (real)(-20 + 40 * (i + 0.3) / COUNT), one[i] = 1;
    gelu_forward(y, slope, x, COUNT);
    gelu_backward(one, slope, COUNT);
    for (int i = 0; i < COUNT; i++) {
        double v = x[i], h = tanh(sqrt(2 / M_PI) * (v + 0.044715 * v * v * v));
        double du = sqrt(2 / M_PI) * (1 + 3 * 0.044715 * v * v);
        worsens(&worst[1], fabs(y[i] - v / 2 * (1 + h)) / fabs(v) * (1 << 24));
        worsens(&worst[2], fabs(one[i] - (1 + h) / 2 - v / 2 * (1 - h * h) * du) * (1 << 24));
    }
    free(x);
    int nan = isnan(fast_exp(NAN)) && isnan(fast_exp(-NAN));
    result(worst[0] <= 1.1 && worst[1] <= 4 && worst[2] <= 8 && nan, "exp and GELU",
           "exp within %.2f units in the last place; GELU %.2f, its slope %.2f times 2^-24; NaN stays",
           worst[0], worst[1], worst[2]);

    Config c = config_default();
    model_preset(&c, "B/1");
    Params w;
    Table t = params_table(&w, &c, NULL);
    size_t n = count_trained(&t);
    free(t.tensors);
    result(n == 140037675 && tokens_of(&c) == 257 && kept_of(&c) == 64, "B/1",
           "%zu trained parameters, %d tokens, %d kept", n, tokens_of(&c), kept_of(&c));
    c.shift_base = 4096;
    int clamped = 1;
    for (int i = 0; i < 100; i++) c.in_channels = 1 + i, clamped &= shift_time(&c, 1) <= 1;
    result(clamped && shift_time(&c, 0) == 0, "time shift", "never beyond 1");
}

// ----------------------------------------------------------------------------------------------------------
// Whole runs, as a user starts them: this program runs itself as the trainer

static const char *self;
static char folder[] = "/tmp/srdit-test-XXXXXX";

// Runs this program with the arguments (split at blanks); its output goes to `folder`/out and /err. Returns
// the status.
__attribute__((format(printf, 2, 3))) static int run_self(int interrupt_after_ms, const char *format, ...) {
    char line[2048], *argv[64], out[64], err[64];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    int n = 0, status;
    argv[n++] = (char *)self;
    for (char *word = strtok(line, " "); word && n < 63; word = strtok(NULL, " ")) argv[n++] = word;
    argv[n] = NULL;
    snprintf(out, sizeof(out), "%s/out", folder), snprintf(err, sizeof(err), "%s/err", folder);
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0) die("cannot fork: %s", strerror(errno));
    if (!pid) {
        if (!freopen(out, "w", stdout) || !freopen(err, "w", stderr)) _exit(99);
        signal(SIGINT, SIG_DFL);   // a shell's background job ignores it, and the trainer leaves that so
        execv(self, argv);
        _exit(98);
    }
    if (interrupt_after_ms) usleep(1000 * (useconds_t)interrupt_after_ms), kill(pid, SIGINT);
    if (waitpid(pid, &status, 0) < 0) die("cannot wait: %s", strerror(errno));
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static char *file_text(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    char *text = (char *)alloc_zero(1 << 26, 1);
    *n = f ? fread(text, 1, (1 << 26) - 1, f) : 0;
    if (f) fclose(f);
    return text;
}
static char *in_folder(const char *name) {   // the last eight of these stay valid
    static char paths[8][PATH_MAX];
    static int next;
    next = (next + 1) % 8;
    snprintf(paths[next], PATH_MAX, "%s/%s", folder, name);
    return paths[next];
}
static int same_files(const char *a, const char *b) {
    size_t n, m;
    char *x = file_text(a, &n), *y = file_text(b, &m);
    int same = n && n == m && !memcmp(x, y, n);
    free(x), free(y);
    return same;
}
// Did the last run say one sentence, an error that holds `words`?
static int complained(const char *words) {
    size_t n;
    char *text = file_text(in_folder("err"), &n);
    int good =
        n > 8 && !strncmp(text, "error: ", 7) && strchr(text, '\n') == text + n - 1 && strstr(text, words);
    if (!good) printf("     it said: %s\n", text);
    free(text);
    return good;
}

#define NANO                                                                                                 \
    "--as-trainer --depth 3 --num-f 1 --num-h 1 --hidden-size 16 --num-heads 2 --projector-dim 8 --batch 6 "
static void test_runs(void) {
    char *a = in_folder("a"), *b = in_folder("b"), path[PATH_MAX];
    int first = run_self(0, NANO "--steps 8 --sample-steps 2 --threads 2 --path-drop-prob 0.3 --out %s", a);
    int half = run_self(0, NANO "--steps 4 --sample-steps 2 --threads 2 --path-drop-prob 0.3 --out %s", b);
    snprintf(path, sizeof(path), "%s/checkpoint.safetensors", b);
    int rest =
        run_self(0, "--as-trainer --resume %s --steps 8 --sample-steps 2 --threads 2 --out %s", path, b);
    char a_path[PATH_MAX];
    snprintf(a_path, sizeof(a_path), "%s/checkpoint.safetensors", a);
    result(!first && !half && !rest && same_files(a_path, path), "resume",
           "8 steps = 4 + resume + 4, bit for bit");
    int one = run_self(
        0, NANO "--steps 8 --sample-steps 2 --threads 1 --path-drop-prob 0.3 --overwrite --out %s", b);
    result(!one && same_files(a_path, path) &&
               same_files(in_folder("a/samples.png"), in_folder("b/samples.png")),
           "threads", "1 and 2 threads, the same checkpoint and pictures bit for bit");
    // beyond the paper
    static const char *const later[] = {"--recipe srdit13",
                                        "--optimizer muon --muon-lr 0.01 --weight-decay 0.1"};
    for (int i = 0; i < 2; i++) {
        int two = run_self(0, NANO "%s --steps 6 --sample-steps 2 --path-drop-prob 0.3 --overwrite --out %s",
                           later[i], a);
        half = run_self(0, NANO "%s --steps 3 --sample-steps 2 --path-drop-prob 0.3 --overwrite --out %s",
                        later[i], b);
        rest =
            run_self(0, "--as-trainer --resume %s --steps 6 --sample-steps 2 --threads 1 --out %s", path, b);
        result(!two && !half && !rest && same_files(a_path, path),
               i ? "resume, Muon split" : "resume, srdit13",
               "6 steps = 3 + resume + 3 on one thread, bit for bit");
    }
    SafeFile *files[2];
    for (int i = 0; i < 2; i++) {   // the paper's settings, spelled out, change no bit; nor are they written
        int ran =
            run_self(0, NANO "%s --steps 3 --sample-steps 2 --overwrite --out %s",
                     i ? "--recipe paper --optimizer adamw --align-depths 1 --immiscible 1" : "", i ? b : a);
        files[i] = ran ? NULL : safe_open(i ? path : a_path);
    }
    int same = files[0] && files[1] && files[0]->count == files[1]->count;
    for (int i = 0; same && i < files[0]->count; i++) {
        const SafeTensor *x = &files[0]->tensors[i], *y = safe_find(files[1], x->name);
        same &= y && safe_elements(x) == safe_elements(y) &&
                !memcmp(safe_data(files[0], x), safe_data(files[1], y), safe_elements(x) * sizeof(real));
    }
    static const char *const unsaid_names[] = {"optimizer", "muon", "muon_lr", "immiscible", "mlp_widths"};
    for (int i = 0; same && i < 5; i++) same &= !safe_metadata(files[1], unsaid_names[i]);
    result(same, "recipe paper", "is the default bit for bit, and its files do not name what came later");
    for (int i = 0; i < 2; i++)
        if (files[i]) safe_close(files[i]);
    int ran = run_self(
        0, NANO "--recipe srdit13 --optimizer adamw --steps 1 --sample-steps 2 --overwrite --out %s", b);
    SafeFile *left = ran ? NULL : safe_open(path);
    for (int i = 0; left && i < 3; i++) ran |= safe_metadata(left, unsaid_names[i]) != NULL;
    result(left && !ran && safe_metadata(left, "mlp_widths"), "recipe srdit13, AdamW",
           "its checkpoint has the recipe's widths, and nothing of Muon");
    if (left) safe_close(left);
    run_self(0, NANO "--steps 3 --sample-steps 2 --overwrite --out %s", a);
    int stopped = run_self(1500, NANO "--steps 1000000 --sample-steps 2 --out %s", in_folder("c"));
    int on = run_self(0, "--as-trainer --resume %s --steps 1 --sample-steps 2 --out %s --export %s",
                      in_folder("c/checkpoint.safetensors"), in_folder("c"), in_folder("export.safetensors"));
    result(stopped == 130 && !on, "Ctrl-C",
           "the step is finished, the checkpoint written and good to resume and export");
    stopped =
        run_self(1500, NANO "--recipe srdit13 --steps 1000000 --sample-steps 2 --out %s", in_folder("d"));
    size_t n;
    char *text = file_text(in_folder("out"), &n), *again = strstr(text, "to go on:  ");
    if (again) again[strcspn(again, "\n")] = 0;
    on = again ? run_self(1500, "%s", again + 11) : -1;   // (here --as-trainer is the program's name)
    result(stopped == 130 && on == 130, "the command after Ctrl-C", "goes on");
    free(text);
    SafeFile *f = safe_open(in_folder("export.safetensors"));
    Config c = config_default();
    static const char *const none[] = {NULL};
    config_read(&c, f, none);
    Params w;
    Table t = params_table(&w, &c, NULL);
    int all = f->count == t.count;
    for (int i = 0; i < t.count; i++) all &= safe_find(f, t.tensors[i].name) != NULL;
    result(all, "export", "%d tensors under the reference implementation's names", f->count);
    free(t.tensors), safe_close(f);
}

// Mistakes: a non-zero exit and one sentence that says what is wrong
static void expect(const char *name, int status, const char *words) {
    int good = status == 1 && complained(words);
    result(good, name, "refused: ... %s ...", words);
}

static void test_mistakes(void) {
    expect("unknown flag", run_self(0, "--as-trainer --stps 3"), "did you mean --steps");
    expect("no such file", run_self(0, "--as-trainer --data %s", in_folder("none")), "cannot be opened");
    expect("not a number", run_self(0, "--as-trainer --lr fast"), "not a number");
    expect("a flag given twice", run_self(0, "--as-trainer --data a --batch 3 --data b"),
           "--data is given twice");
    expect("a switch given twice", run_self(0, "--as-trainer --no-cls --no-cls"), "--no-cls is given twice");
    expect("tolerance", run_self(0, "--tolerance inf x"), "not a number");
    expect("not a decimal number", run_self(0, "--as-trainer --steps 0x10"), "not a number");
    expect("a flag for a value", run_self(0, "--as-trainer --out --overwrite"), "--out needs a value");
    expect("resumed twice", run_self(0, "--as-trainer --resume a --resume b"), "--resume is given twice");
    const char *digits = "data/digits.safetensors";
    expect("a shard twice", run_self(0, "--as-trainer --data %s %s", digits, digits), "the same samples");
    expect("out of range", run_self(0, "--as-trainer --batch 0"), "--batch is 0");
    expect("no such model", run_self(0, "--as-trainer --model B/3"), "no such model");
    expect("width and heads", run_self(0, "--as-trainer --hidden-size 30"), "multiple of 4");
    expect("patch size", run_self(0, "--as-trainer --patch-size 3"), "does not divide");
    expect("patches and features", run_self(0, "--as-trainer --patch-size 2"), "features for 65 tokens");
    expect("width of the features", run_self(0, "--as-trainer --z-dim 31"), "--z-dim");
    expect("classes", run_self(0, "--as-trainer --num-classes 9"), "10 classes");
    expect("accumulation", run_self(0, "--as-trainer --accum 7"), "does not divide");
    expect("folder", run_self(0, "--as-trainer --steps 1 --out /dev/null/x"), "/dev/null");
    expect("other shapes on resume",
           run_self(0, "--as-trainer --resume %s --hidden-size 32", in_folder("a/checkpoint.safetensors")),
           "hidden_size");
    char adamw[PATH_MAX];
    snprintf(adamw, PATH_MAX, "%s", in_folder("a/checkpoint.safetensors"));
    expect("no such recipe", run_self(0, "--as-trainer --recipe x"), "there are paper and srdit13");
    expect("no such optimizer", run_self(0, "--as-trainer --optimizer sgd"), "there are: adamw muon");
    expect("Muon's option without it", run_self(0, "--as-trainer --muon-lr 0.1"),
           "--muon-lr is for --optimizer");
    expect("two widths of the MLP", run_self(0, "--as-trainer --mlp-widths 2,6 --mlp-ratio 3"),
           "exclude each other");
    expect("a depth outside", run_self(0, "--as-trainer --align-depths 2,7"), "blocks 1 to 6");
    expect("a depth of 0", run_self(0, "--as-trainer --align-depths 0,2"), "not a number from 1");
    expect("half a depth", run_self(0, "--as-trainer --align-depths 2.5"), "--align-depths has 2.5");
    expect("a depth twice", run_self(0, "--as-trainer --align-depths 2,2"), "must rise");
    expect("depths that are no numbers", run_self(0, "--as-trainer --align-depths 2,x"), "not a number");
    expect("too many depths", run_self(0, "--as-trainer --align-depths 1,2,3,4,5,6,7,8,9"), "more than 8");
    expect("a depth missing at the end", run_self(0, "--as-trainer --align-depths 1,2,"),
           "a number is missing");
    expect("a depth missing", run_self(0, "--as-trainer --align-depths 1,,2"), "a number is missing");
    expect("no depth", run_self(0, "--as-trainer --align-depths="), "a number is missing");
    expect("a switch with a value", run_self(0, "--as-trainer --no-cls=1"), "write --no-cls alone");
    expect("a switch with an empty value", run_self(0, "--as-trainer --overwrite="),
           "write --overwrite alone");
    expect("depths, no alignment", run_self(0, "--as-trainer --no-align --align-depths 2"),
           "--align-depths without alignment");
    expect("one width", run_self(0, "--as-trainer --mlp-widths 2"), "--mlp-widths are two");
    expect("no candidate", run_self(0, "--as-trainer --immiscible 0"), "--immiscible is 0");
    expect("the other optimizer", run_self(0, "--as-trainer --resume %s --optimizer muon", adamw),
           "its optimizer is adamw; it cannot be changed to muon");
    expect("other depths", run_self(0, "--as-trainer --resume %s --align-depths 2", adamw), "align_depths");
    expect("a recipe on resume", run_self(0, "--as-trainer --resume %s --recipe srdit13", adamw),
           "has its recipe already");
    // NaN: the checkpoint before it stays
    run_self(0, NANO "--steps 2 --sample-steps 1 --out %s", in_folder("n"));
    size_t n, m;
    char *before = file_text(in_folder("n/checkpoint.safetensors"), &n);
    expect("NaN in the loss",
           run_self(0, "--as-trainer --resume %s --lr 1e6 --steps 50 --out %s",
                    in_folder("n/checkpoint.safetensors"), in_folder("n")),
           "not a finite number; first bad: ");
    char *after = file_text(in_folder("n/checkpoint.safetensors"), &m);
    result(n == m && !memcmp(before, after, n), "NaN and the checkpoint", "the last good one is untouched");
    free(after);
    int status = run_self(0, NANO "--steps 2 --lr 1e6 --sample-steps 4 --out %s", in_folder("nan"));
    result(status == 1 && complained("not made of finite numbers") &&
               access(in_folder("nan/samples.png"), F_OK) &&
               !access(in_folder("nan/checkpoint.safetensors"), F_OK),
           "NaN in the pictures", "said, and none are written");
    // a full disk, played by /dev/full under the temporary name
    if (symlink("/dev/full", in_folder("n/checkpoint.safetensors" PART)))
        die("cannot link: %s", strerror(errno));
    expect("full disk",
           run_self(0, "--as-trainer --resume %s --steps 3 --sample-steps 1 --out %s",
                    in_folder("n/checkpoint.safetensors"), in_folder("n")),
           "No space left");
    after = file_text(in_folder("n/checkpoint.safetensors"), &m);
    result(n == m && !memcmp(before, after, n), "full disk, checkpoint", "the last good one is untouched");
    free(before), free(after);
}

// A checkpoint's data are its own shards in their order; a link stays a link; --steps 0 leaves nothing
// behind.
static void test_shards_and_links(void) {
    char *order[2] = {in_folder("one.safetensors"), in_folder("two.safetensors")}, *at = in_folder("s");
    size_t n;
    char *text = file_text("data/digits.safetensors", &n), checkpoint[PATH_MAX], moved[PATH_MAX];
    SafeFile *digits = safe_open("data/digits.safetensors");
    for (int i = 0; i < 2; i++) {
        text[digits->data - digits->map + (long)safe_find(digits, "latents")->begin] = (char)i;
        FILE *f = fopen(order[i], "wb");
        if (!f || fwrite(text, 1, n, f) != n || fclose(f)) die("cannot write");
    }
    safe_close(digits);
    free(text);
    snprintf(checkpoint, sizeof(checkpoint), "%s/checkpoint.safetensors", at);
    snprintf(moved, sizeof(moved), "%s/moved", at);
    int began = run_self(0, NANO "--steps=2 --sample-steps=1 --lr=1e-3 --data %s %s --out=%s", order[0],
                         order[1], at);
    expect("shards in another order",
           run_self(0, "--as-trainer --resume %s --steps 3 --data %s %s", checkpoint, order[1], order[0]),
           "in the order of then");
    struct stat st;
    if (rename(checkpoint, moved) || symlink("moved", checkpoint)) die("cannot link");
    int on = run_self(0, "--as-trainer --resume %s --steps 3 --sample-steps 1 --data %s %s", checkpoint,
                      order[0], order[1]);
    SafeFile *f = safe_open(moved);
    result(!began && !on && !lstat(checkpoint, &st) && S_ISLNK(st.st_mode) && safe_number(f, "step", 0) == 3,
           "a checkpoint that is a link", "goes on where the link points; --flag=value is read");
    safe_close(f);
    int none = run_self(0, NANO "--steps 0 --out %s", in_folder("nothing/here"));
    result(!none && access(in_folder("nothing/here"), F_OK), "--steps 0", "leaves no folder");
    if (mkdir(in_folder("dir"), 0777) || mkdir(in_folder("dir/samples.png"), 0777)) die("no folder");
    expect("samples.png is a folder", run_self(0, NANO "--steps 1 --overwrite --out %s", in_folder("dir")),
           "not a file");
    int many = run_self(0, NANO "--steps 1 --sample-steps 1 --threads 4096 --out %s", in_folder("many"));
    text = file_text(in_folder("out"), &n);
    result(!many && strstr(text, "four for each processor"), "--threads 4096", "is cut, and said to be");
    free(text);
}

// A command typed twice loses nothing: a new run goes to a free folder, and one that holds a run is
// replaced only where the command says so and a step has succeeded
static void test_folders(void) {
    char *made[3], *now[3], here[PATH_MAX];
    static const char *const names[] = {"free/out/checkpoint.safetensors",
                                        "free/out-2/checkpoint.safetensors",
                                        "free/out-3/checkpoint.safetensors"};
    size_t size[3], n;
    int status = 0, same = 1;
    if (!getcwd(here, sizeof(here)) || mkdir(in_folder("free"), 0777)) die("cannot make a folder");
    for (int i = 0; i < 3; i++) {   // the same command three times, without --out
        if (chdir(in_folder("free"))) die("no folder");
        status |=
            run_self(0, NANO "--steps %d --sample-steps 1 --data %s/data/digits.safetensors", i + 1, here);
        if (chdir(here)) die("no folder");
    }
    for (int i = 0; i < 3; i++) made[i] = file_text(in_folder(names[i]), &size[i]);
    result(!status && size[0] && size[1] && size[2], "a run typed three times", "out, out-2 and out-3");
    char out[PATH_MAX], checkpoint[PATH_MAX], other[PATH_MAX], log[PATH_MAX];
    snprintf(out, sizeof(out), "%s", in_folder("free/out"));
    snprintf(checkpoint, sizeof(checkpoint), "%s", in_folder(names[0]));
    snprintf(other, sizeof(other), "%s", in_folder(names[1]));
    snprintf(log, sizeof(log), "%s", in_folder("free/out/log.csv"));
    char *rows = file_text(log, &n);
    expect("--out that holds a run", run_self(0, NANO "--steps 1 --out %s", out), "--overwrite");
    expect("resumed into another's", run_self(0, "--as-trainer --resume %s --steps 9 --out %s", other, out),
           "holds another run");
    expect("a start that dies", run_self(0, NANO "--steps 1 --overwrite --data %s --out %s", other, out),
           "latents");
    expect("an export over a checkpoint",
           run_self(0, NANO "--steps 1 --out %s --export %s", in_folder("free/e"), other), "--export");
    expect(
        "an export over its run's log",
        run_self(0, "--as-trainer --resume %s --steps 5 --export %s", other, in_folder("free/out-2/log.csv")),
        "a file of this run");
    const char *letters[] = {in_folder("letter"), in_folder("race/track.log")};
    if (mkdir(in_folder("race"), 0777)) die("cannot make a folder");
    for (int i = 0; i < 2; i++) {
        FILE *letter = fopen(letters[i], "w");
        if (!letter || fputs("dear diary", letter) < 0 || fclose(letter)) die("cannot write");
    }
    expect("an export over a letter",
           run_self(0, NANO "--steps 1 --out %s --export %s", in_folder("free/e"), letters[0]),
           "of another kind");
    expect("beside a run of the race", run_self(0, NANO "--steps 1 --out %s", in_folder("race")),
           "a run of the race");
    expect("an export over its run", run_self(0, "--as-trainer --resume %s --export %s", other, other),
           "--export");
    status = run_self(0, NANO "--steps 0 --overwrite --out %s", out);
    for (int i = 0; i < 3; i++) {
        now[i] = file_text(in_folder(names[i]), &n);
        same &= n == size[i] && !memcmp(now[i], made[i], n);
        free(now[i]);
    }
    char *still = file_text(log, &n);
    result(!status && same && !strcmp(rows, still), "what was refused",
           "and --steps 0 left checkpoints and log alone");
    status = run_self(0, "--as-trainer --resume %s --steps 4 --sample-steps 1", other);   // without --out
    SafeFile *f = safe_open(other);
    double step = safe_number(f, "step", 0);
    safe_close(f);
    now[0] = file_text(checkpoint, &n);
    result(!status && step == 4 && n == size[0] && !memcmp(now[0], made[0], n), "resume without --out",
           "goes on beside its checkpoint");
    status = run_self(0, NANO "--steps 2 --sample-steps 1 --overwrite --out %s", out);
    f = safe_open(checkpoint);
    step = safe_number(f, "step", 0);
    safe_close(f);
    result(!status && step == 2, "--overwrite", "replaces the run");
    // a second run that dies after its first step leaves a folder that is its own throughout
    expect("--overwrite, NaN in the loss",
           run_self(0, NANO "--lr 1e6 --steps 50 --sample-steps 1 --overwrite --out %s", out),
           "The last checkpoint is ");
    f = safe_open(checkpoint);
    step = safe_number(f, "step", 0);
    safe_close(f);
    result(step == 1 && access(in_folder("free/out/samples.png"), F_OK), "--overwrite and a death",
           "checkpoint and log are the new run's, the old picture is gone");
    // another run's rows do not stand in the log of one that is resumed over it
    run_self(0, NANO "--steps 2 --sample-steps 1 --overwrite --out %s", out);
    status = run_self(0, "--as-trainer --resume %s --steps 5 --sample-steps 1 --overwrite --out %s",
                      in_folder(names[2]), out);
    char *mixed = file_text(log, &n);
    result(!status && strstr(mixed, "\n5,") && !strstr(mixed, "\n1,"), "--resume --overwrite",
           "the log has no rows of the run that it replaces");
    // a log that cannot be written anew stays, and so does all else
    if (symlink("/dev/full", in_folder("free/out/log.csv" PART))) die("cannot link: %s", strerror(errno));
    expect("full disk, log", run_self(0, "--as-trainer --resume %s --steps 6 --sample-steps 1", checkpoint),
           "No space left");
    char *left = file_text(log, &n);
    result(n && !strcmp(left, mixed), "full disk and the log", "the rows are untouched");
    free(mixed), free(left);
    for (int i = 0; i < 3; i++) free(made[i]);
    free(now[0]), free(rows), free(still);
}

// safetensors files with one thing wrong each: a header and so many bytes of data
static void write_raw(const char *path, uint64_t length, const char *header, size_t data_bytes) {
    FILE *f = fopen(path, "wb");
    if (!f) die("%s: cannot be written", path);
    for (int i = 0; i < 8; i++) fputc((int)(length >> (8 * i) & 255), f);
    fputs(header, f);
    for (size_t i = 0; i < data_bytes; i++) fputc(0, f);
    fclose(f);
}
// A model made with one thread is used with three (its scratch is for one), and a routing of as many tokens
// as a configuration may have is drawn
static void test_late_threads(void) {
    Config c = small_config();
    int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    Model *m = backend->create(&c, 3, 1);
    Batch *batch = random_batch(&c, 3, 0, 3, 8, 0);
    randomize(m, 5);
    double with_one = loss_of(m, batch).total;
    omp_set_num_threads(3);
    double with_three = loss_of(m, batch).total;
    omp_set_num_threads(threads);
    result(with_one == with_three, "threads added later", "the same loss");
    batch_free(batch), backend->destroy(m);

    enum { T = 65536, KEPT = 16384 };
    int *ids = (int *)alloc_zero(T, sizeof(int)), good = 1;
    uint64_t *keys = (uint64_t *)alloc_zero(T, sizeof(uint64_t)), above = 0;
    draw_kept(ids, KEPT, T, keys, 9, 0, 1);
    for (int i = 0; i < KEPT; i++) good &= ids[i] >= 0 && ids[i] < T && (!i || ids[i] > ids[i - 1]);
    uint64_t most = 0;   // the definition: no token left out has a smaller key than one kept
    for (int i = 0; i < KEPT; i++)
        most = route_key((size_t)ids[i], 9, 0, 1) > most ? route_key((size_t)ids[i], 9, 0, 1) : most;
    for (size_t i = 0; i < T; i++) above += route_key(i, 9, 0, 1) > most;
    result(good && above == T - KEPT, "routing, many tokens", "%d of %d, those with the smallest keys", KEPT,
           T);
    free(ids), free(keys);
}

// An expected value that is not finite must be met exactly, and makes nothing else pass
static void test_comparisons(void) {
    static const double want[][2] = {{1, 2}, {INFINITY, 2}, {NAN, 2}, {INFINITY, 2}, {-INFINITY, 2}};
    static const real got[][2] = {{1, 2}, {(real)INFINITY, 3}, {1, 2}, {1, 2}, {(real)INFINITY, 2}};
    int failed_ones = 0;
    for (int i = 0; i < 5; i++) {
        Report r;
        memset(&r, 0, sizeof(r));
        compare(&r, "x", got[i], want[i], 2, 1e-3, 0);
        failed_ones += r.failed << i;
        free(r.checks);
    }
    result(failed_ones == 30, "infinite references", "1 of 5 comparisons passes");
}

// A data set's name reaches the checkpoint as it was, and is cut between two characters
static void test_names(void) {
    static const char *const shard = "{\"__metadata__\":{\"classes\":\"10\",\"name\":\"%s\"},\"latents\":{"
                                     "\"dtype\":\"U8\",\"shape\":[6,1,8,8],\"data_offsets\":[0,384]},"
                                     "\"labels\":{\"dtype\":\"U8\",\"shape\":[6],"
                                     "\"data_offsets\":[384,390]}}";
    char header[1024], long_name[160], cut[160];
    memset(long_name, 'a', 126);
    snprintf(cut, sizeof(cut), "%.126s", long_name);
    snprintf(long_name + 126, sizeof(long_name) - 126, "\xc3\xa9");   // bytes 127 and 128 of a name of 127
    const char *names[2][2] = {{"dogs \\ud83d\\udc36", "dogs \xf0\x9f\x90\xb6"}, {long_name, cut}};
    for (int i = 0; i < 2; i++) {
        char out[32];
        snprintf(out, sizeof(out), "name%d", i);
        snprintf(header, sizeof(header), shard, names[i][0]);
        write_raw(in_folder("named"), strlen(header), header, 390);
        int status = run_self(0, NANO "--no-align --no-cls --steps 1 --sample-steps 1 --data %s --out %s",
                              in_folder("named"), in_folder(out));
        snprintf(out, sizeof(out), "name%d/checkpoint.safetensors", i);
        SafeFile *f = status ? NULL : safe_open(in_folder(out));
        const char *data = f ? safe_metadata(f, "data") : "";
        result(!strcmp(data, names[i][1]), i ? "a name cut" : "a name beyond the basic plane", "%.20s%s",
               data, i ? "..." : "");
        if (f) safe_close(f);
    }
}

// Every half and every brain float against their definition; every type read in pieces as one by one
static void test_types(void) {
    static uint16_t all[65536];
    static real got[65536];
    int wrong = 0, cases = 0;
    for (int i = 0; i < 65536; i++) all[i] = (uint16_t)i;
    elements_read(got, all, F16, 0, 65536, 1, 0);
    for (int i = 0; i < 65536; i++) {
        int e = i >> 10 & 31, m = i & 1023;
        double x = e == 31 ? (m ? NAN : INFINITY) : e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
        if (i >> 15) x = -x;
        wrong += isnan(x) ? !isnan(got[i]) : got[i] != (real)x || !signbit(got[i]) != !signbit(x);
    }
    elements_read(got, all, BF16, 0, 65536, 1, 0);
    for (int i = 0; i < 65536; i++) {
        int e = i >> 7 & 255, m = i & 127;
        double x = e == 255 ? (m ? NAN : INFINITY) : e ? ldexp(128 + m, e - 134) : ldexp(m, -133);
        if (i >> 15) x = -x;
        wrong += isnan(x) ? !isnan(got[i]) : got[i] != (real)x || !signbit(got[i]) != !signbit(x);
    }
    const uint8_t *bytes = (const uint8_t *)all + 3;   // not aligned
    for (int type = 0; type < DTYPES; type++, cases++)
        for (size_t first = 0; first < 7000; first += 100) {
            elements_read(got, bytes, (enum Dtype)type, first, 100, 0.5, -1);
            for (size_t i = 0; i < 100; i++) {
                real one = (real)element(bytes, (enum Dtype)type, first + i),
                     x = (real)((double)one * 0.5 - 1);
                wrong += isnan(x) ? !isnan(got[i]) : got[i] != x;
            }
        }
    result(!wrong, "number types", "%s: all F16 and BF16; %d types in pieces; %d wrong", precision, cases,
           wrong);
}

static void test_damaged(void) {
#define T(name, dtype, shape, from, to)                                                                      \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" from "," to "]}"
    static const struct {
        const char *name, *header;
        size_t bytes;
        const char *words;
    } cases[] = {
        {"truncated", "{" T("a", "F32", "4", "0", "16") "}", 12, "outside the file"},
        {"overlap", "{" T("a", "F32", "4", "0", "16") "," T("b", "F32", "4", "12", "28") "}", 28, "overlaps"},
        {"hole", "{" T("a", "F32", "4", "0", "16") "," T("b", "F32", "4", "20", "36") "}", 36, "hole"},
        {"trailing bytes", "{" T("a", "F32", "4", "0", "16") "}", 17, "follow the last tensor"},
        {"duplicate name", "{" T("a", "F32", "4", "0", "16") "," T("a", "F32", "4", "16", "32") "}", 32,
         "twice"},
        {"size", "{" T("a", "F32", "5", "0", "16") "}", 16, "needs 20 bytes"},
        {"unknown dtype", "{" T("a", "F33", "4", "0", "16") "}", 16, "unknown dtype"},
        {"overflow", "{" T("a", "F32", "4294967296,4294967296,4294967296", "0", "16") "}", 16, "overflows"},
        {"overflow to 0", "{" T("a", "F32", "4611686018427387904,4", "0", "0") "}", 0, "number is too large"},
        {"negative offset", "{" T("a", "F32", "4", "-16", "0") "}", 16, "whole number"},
        {"offsets backwards", "{" T("a", "F32", "4", "16", "0") "}", 16, "outside"},
        {"many dimensions", "{" T("a", "F32", "1,1,1,1,1,1,1,1,1", "0", "4") "}", 4, "dimensions"},
        {"no shape", "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "missing"},
        {"extra key", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":[1]}}", 4,
         "unknown or repeated"},
        {"not JSON", "hello", 0, "does not begin"},
        {"unfinished JSON", "{\"a\":{\"dtype\":\"F32\"", 0, "expected"},
        {"unfinished string", "{\"a", 0, "does not end"},
        {"metadata not text", "{\"__metadata__\":{\"a\":3}}", 0, "expected"},
        {"metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "twice"},
        {"lone surrogate", "{\"__metadata__\":{\"a\":\"\\ud83d!\"}}", 0, "lone surrogate"},
        {"not UTF-8", "{\"__metadata__\":{\"a\":\"\xc3(\"}}", 0, "not UTF-8"},
        {"UTF-8, not shortest", "{\"__metadata__\":{\"a\":\"\xc0\xaf\"}}", 0, "not UTF-8"},
        {"after the end", "{} {}", 0, "something follows"}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char name[64];
        write_raw(in_folder("bad"), strlen(cases[i].header), cases[i].header, cases[i].bytes);
        snprintf(name, sizeof(name), "safetensors: %s", cases[i].name);
        expect(name, run_self(0, "--open %s", in_folder("bad")), cases[i].words);
    }
    write_raw(in_folder("bad"), 1ull << 40, "{}", 0);
    expect("safetensors: huge header", run_self(0, "--open %s", in_folder("bad")), "header claims");
    write_raw(in_folder("bad"), 1000, "{}", 0);
    expect("safetensors: short file", run_self(0, "--open %s", in_folder("bad")), "header claims");
    static const char good[] = "{ \"__metadata__\" : {\"k\\u00e9y\":\"v\\n\"} , " T(
        "b", "U8", "", "0", "1") "," T("a", "BF16", "2,0", "1", "1") "}  ";
    write_raw(in_folder("good"), strlen(good), good, 1);
    result(!run_self(0, "--open %s", in_folder("good")), "safetensors: unusual",
           "blanks, escapes, scalar, empty tensor are read");

    // data and checkpoints that are sound files but wrong ones
    static const char *const shard = "{\"__metadata__\":{\"classes\":\"3\"},%s,%s}";
    static const struct {
        const char *name, *latents, *labels;
        size_t bytes;
        int label;
        const char *words;
    } data[] = {{"data: label", T("latents", "U8", "2,1,2,2", "0", "8"), T("labels", "U8", "2", "8", "10"),
                 10, 7, "sample 1 has label 7"},
                {"data: count", T("latents", "U8", "2,1,2,2", "0", "8"), T("labels", "U8", "3", "8", "11"),
                 11, 0, "3 labels for 2"},
                {"data: label type", T("latents", "U8", "2,1,2,2", "0", "8"),
                 T("labels", "F32", "2", "8", "16"), 16, 0, "an integer type is expected"},
                {"data: not square", T("latents", "U8", "2,1,2,3", "0", "12"),
                 T("labels", "U8", "2", "12", "14"), 14, 0, "differ"},
                {"data: no labels", T("latents", "U8", "2,1,2,2", "0", "8"),
                 T("lables", "U8", "2", "8", "10"), 10, 0, "labels is missing"},
                {"data: no features", T("latents", "U8", "2,1,2,2", "0", "8"),
                 T("labels", "U8", "2", "8", "10"), 10, 0, "--no-align"}};
    for (size_t i = 0; i < sizeof(data) / sizeof(data[0]); i++) {
        char header[1024];
        snprintf(header, sizeof(header), shard, data[i].latents, data[i].labels);
        write_raw(in_folder("bad"), strlen(header), header, data[i].bytes - 1);
        FILE *f = fopen(in_folder("bad"), "ab");
        if (!f) die("cannot append");
        fputc(data[i].label, f), fclose(f);
        expect(data[i].name, run_self(0, "--as-trainer --data %s", in_folder("bad")), data[i].words);
    }
    size_t n;
    char *text = file_text(in_folder("a/checkpoint.safetensors"), &n);
    static const struct {
        const char *name, *from, *to, *words;
    } edits[] = {
        {"checkpoint: wrong shape", "\"shape\":[16,32],", "\"shape\":[32,16],", "its shape is not that"},
        {"checkpoint: no tensor", "\"model.mask_token\"", "\"model.mask_tokem\"",
         "model.mask_token is missing"},
        {"checkpoint: wrong data", "\"data\":\"digits\"", "\"data\":\"widgit\"", "was trained on widgit"},
        {"checkpoint: scale", "\"latent_scale\":\"0.125\"", "\"latent_scale\":\"0.129\"", "latent scale"},
        {"checkpoint: depth", "\"depth\":\"3\"", "\"depth\":\"9\"", "is missing"},
        {"checkpoint: wrong dtype", "\"model.mask_token\":{\"dtype\":\"F32\"",
         "\"model.mask_token\":{\"dtype\":\"I32\"", "floating point is expected"},
        {"checkpoint: no step", "\"step\":", "\"stap\":", "no step"},
        {"checkpoint: fraction", "\"depth\":\"3\"", "\"depth\":\".\"", "not a number"},
        {"checkpoint: bad setting", "\"depth\":\"3\"", "\"depth\":\"x\"", "not a number"}};
    for (size_t i = 0; i < sizeof(edits) / sizeof(edits[0]); i++) {
        char *copy = (char *)alloc_zero(n, 1), *at;
        memcpy(copy, text, n);
        at = (char *)memmem(copy, n, edits[i].from, strlen(edits[i].from));
        if (at) memcpy(at, edits[i].to, strlen(edits[i].to));
        FILE *f = fopen(in_folder("bad"), "wb");
        if (!f || fwrite(copy, 1, n, f) != n || fclose(f)) die("cannot write");
        free(copy);
        if (!at) result(0, edits[i].name, "the text to change was not found");
        else
            expect(edits[i].name,
                   run_self(0, "--as-trainer --resume %s --out %s", in_folder("bad"), in_folder("o")),
                   edits[i].words);
    }
    // one bit of the second moment
    SafeFile *whole = safe_open(in_folder("a/checkpoint.safetensors"));
    const SafeTensor *v = safe_find(whole, "adam.v.fusion_proj.weight");
    text[whole->data - whole->map + (long)v->begin + dtypes[v->type].bytes - 1] ^= (char)0x80;
    safe_close(whole);
    FILE *f = fopen(in_folder("bad"), "wb");
    if (!f || fwrite(text, 1, n, f) != n || fclose(f)) die("cannot write");
    expect("checkpoint: negative moment",
           run_self(0, "--as-trainer --resume %s --out %s", in_folder("bad"), in_folder("o")),
           "negative number");
    free(text);
}

#ifdef TEST_CUDA
// ----------------------------------------------------------------------------------------------------------
// train_srdit.cu and sample.cu against train_srdit.c and sample.c. The GPU may be one, or the emulator of
// dev/cuda_on_cpu.
//
// In float: each activation, gradient and updated parameter within 1e-4 of the CPU's, relative in L2. In bf16
// the measure is what rounding alone does: the CPU computes once more with the operands of its products
// rounded to bf16, and the GPU may be off by twice as much as that run is.

enum { MOST_ITEMS = 4096, MOST_LAUNCHES = 256, MOST_LAUNCHES_PLAIN = 325 };
typedef struct {
    char name[96];
    size_t n;
    real *x;
} Item;   // a tensor of a run
typedef struct {
    Item items[MOST_ITEMS];
    int count;
    Losses losses;
} Outcome;

static void keep(Outcome *o, const char *name, const real *x, size_t n) {
    if (o->count == MOST_ITEMS) die("more than %d tensors in one run", MOST_ITEMS);
    Item *i = &o->items[o->count++];
    snprintf(i->name, sizeof(i->name), "%s", name);
    i->n = n, i->x = (real *)alloc_zero(n, sizeof(real));
    memcpy(i->x, x, n * sizeof(real));
}
static void outcome_free(Outcome *o) {
    for (int i = 0; i < o->count; i++) free(o->items[i].x);
    free(o);
}

// The measure of what the GPU may be off by: the CPU's step with everything rounded to bf16 that the GPU
// stores so
static int rounding;
static const Acts *rounded_acts;
static int stored_in_bf16(const real *C) {
    const Acts *a = rounded_acts;
    int stored = C == a->wide || C == a->wide2 || C == a->patch_tokens;
    for (int k = 0; k < MAX_SERIES; k++)
        stored |= C == a->align[k].p0 || C == a->align[k].p2 || C == a->align[k].zs;
    for (int i = 0; i < MAX_DEPTH; i++) {
        const BlockActs *k = &a->block[i];
        stored |= C == k->qkv || C == k->proj || C == k->fc2;
    }
    stored |= a->muon_work && C >= a->muon_work;   // Muon's scratch lies last
    return stored;
}

// One step (two micro-batches where `parts` is 2) from random parameters, and what it leaves
static Outcome *run_step(const Backend *which, const Config *c, int B, int path_drop, int parts) {
    Outcome *o = (Outcome *)alloc_zero(1, sizeof(Outcome));
    const Backend *before = backend;
    backend = which;
    Model *m = which->create(c, B, 1);
    randomize(m, 5);
    real *host = (real *)alloc_zero(m->table.total, sizeof(real));
    which->get_block(host, m, PARAMS);
    round_bf16(host, m->table.total);   // the weights themselves are no part of the comparison
    which->put_block(m, host, PARAMS), which->put_block(m, host, EMA);
    if (path_drop) {   // what a whole step leaves behind is not to be found in it
        Batch *b = random_batch(c, B, 0, B, 9, 0);
        which->forward_backward(m, b);
        which->read_losses(m);
        batch_free(b);
    }
    which->zero_gradients(m);
    rounded_acts = &m->a;
    matmul_rounds = rounding && which == &cpu_backend ? stored_in_bf16 : NULL;
    for (int k = 0; k < parts; k++) {
        Batch *b = random_batch(c, B, k * B, parts * B, 8, path_drop);
        round_bf16(b->feats, (size_t)(B * tokens_of(c) * c->z_dim));
        which->forward_backward(m, b);
        ActivationNames names = activation_names(c);
        for (int i = 0; i < names.count && k == parts - 1; i++) {
            const ActivationName *one = &names.of[i];
            if (path_drop && one->sparse) continue;
            keep(o, one->name, which->activation(m, one->name), one->size * (size_t)B);
        }
        batch_free(b);
    }
    which->get_block(host, m, GRADS);
    for (int turn = 0; turn < 3; turn++) {
        if (turn == 1) which->update(m, 1);
        if (turn) which->get_block(host, m, turn == 1 ? PARAMS : EMA);
        for (int i = 0; i < m->table.count; i++) {
            const Tensor *t = &m->table.tensors[i];
            static const char *const kind[] = {"grad", "after", "ema"};
            char name[96];
            snprintf(name, sizeof(name), "%s.%s", kind[turn], t->name);
            if (t->trained) keep(o, name, host + t->offset, t->size);
        }
    }
    o->losses = which->read_losses(m);
    SamplerWork w = sampler_work(c, B);
    fill_normal(w.x, (size_t)(B * latent_of(c)), 3, 1, 0, 0),
        fill_normal(w.cls, (size_t)(B * c->z_dim), 3, 2, 0, 0);
    for (int i = 0; i < B; i++) w.t[i] = (real)(0.1 + 0.8 * i / B), w.y[i] = i % (c->num_classes + 1);
    for (int drop = 0; drop < 2; drop++) {
        which->velocity(m, w.v[0], w.v_cls[0], w.x, w.cls, w.t, w.y, drop, drop, B);
        keep(o, drop ? "velocity, path dropped, EMA" : "velocity", w.v[0], (size_t)(B * latent_of(c)));
        if (c->cls)
            keep(o, drop ? "velocity of CLS, path dropped, EMA" : "velocity of CLS", w.v_cls[0],
                 (size_t)(B * c->z_dim));
    }
    matmul_rounds = NULL;
    sampler_work_free(&w), free(host), which->destroy(m);
    backend = before;
    return o;
}

static double distance(const Item *a, const Item *b) {   // L2
    double sum = 0;
    for (size_t i = 0; i < a->n; i++) sum += ((double)a->x[i] - b->x[i]) * ((double)a->x[i] - b->x[i]);
    return sqrt(sum);
}
static double length(const Item *a) {
    double sum = 0;
    for (size_t i = 0; i < a->n; i++) sum += (double)a->x[i] * a->x[i];
    return sqrt(sum);
}

// Tensors of one kind: with a name that is the same but for the number of its block
static int same_kind(const char *a, const char *b) {
    while (*a && *b) {
        if (isdigit(*a) && isdigit(*b)) {
            while (isdigit(*a)) a++;
            while (isdigit(*b)) b++;
        } else if (*a++ != *b++) return 0;
    }
    return !*a && !*b;
}

static void compare_step(const char *what, const Config *c, int B, int path_drop, int parts) {
    Outcome *want = run_step(&cpu_backend, c, B, path_drop, parts),
            *got = run_step(&gpu_backend, c, B, path_drop, parts);
    Outcome *round = NULL;
    int in_float = sizeof(gpu::floatX) == 4, bad = 0;
    if (!in_float) rounding = 1, round = run_step(&cpu_backend, c, B, path_drop, parts), rounding = 0;
    double worst = 0;
    char worst_name[96] = "";
    for (int i = 0; i < want->count; i++) {
        Item *w = &want->items[i], *g = &got->items[i];
        double size = length(w), error = distance(g, w), allowed = 1e-4 * size + 1e-12;
        int adam = !strncmp(w->name, "after.", 6) || !strncmp(w->name, "ema.", 4);
        if (!in_float) {
            // A tensor of few numbers may be lucky in the rounded run. So the measure is that of all blocks'
            // tensors of its kind, if that is more, and twice is a little more where there are few numbers to
            // take a mean of.
            double sum = 0, n = 0;
            for (int k = 0; k < want->count; k++)
                if (same_kind(want->items[k].name, w->name)) {
                    double d = distance(&round->items[k], &want->items[k]);
                    sum += d * d, n += (double)w->n;
                }
            double own = distance(&round->items[i], w);
            allowed = 2 * (1 + 2 / sqrt((double)w->n)) * fmax(own, sqrt(sum / n * (double)w->n));
        }
        // Adam divides a gradient by its own size, so that one near 0 may move its parameter the other way:
        // by 2 lr at most
        if (adam) allowed += (in_float ? 0.02 : 2) * c->lr * sqrt((double)w->n);
        double share = error / (allowed + 1e-30);
        if (getenv("SHOW"))
            printf("     %-45s size %9.2e error %9.2e allowed %9.2e share %.3f\n", w->name, size, error,
                   allowed, share);
        if (worsens(&worst, share)) snprintf(worst_name, sizeof(worst_name), "%s", w->name);
        bad += !(share <= 1);
    }
    double loss = fabs(got->losses.total - want->losses.total);
    double loss_allowed =
        in_float ? 1e-5 * (1 + fabs(want->losses.total)) : 5e-3 * (1 + fabs(want->losses.total));
    result(!bad && loss <= loss_allowed, what,
           "%d tensors, %d off; worst %s at %.2f of what is allowed; loss off by %.1e", want->count, bad,
           worst_name, worst, loss);
    outcome_free(want), outcome_free(got);
    if (round) outcome_free(round);
}

// Tokens of a length that has tails everywhere; head width 64, so that attention runs on tensor cores where
// there are any
static Config long_config(int side, int width, int heads) {
    Config c = small_config();
    c.depth = 3, c.num_f = c.num_h = 1, c.hidden_size = width, c.num_heads = heads, c.input_size = side,
    c.patch_size = 1;
    return c;
}

// All that --recipe srdit13 adds, but the noise, which is the batch's: f's blocks are 1 and 2, g's 3 to 5
static Config later_config(void) {
    static const Series depths = {3, {2, 4, 6}}, widths = {2, {2, 8}};
    Config c = small_config();
    c.depth = 7, c.align_depths = depths, c.mlp_widths = widths;
    c.optimizer = MUON, c.muon = SRDIT13, c.muon_lr = 0.05, c.eps = 1e-15;
    return c;
}

// `only`: the tests whose names contain it
static void compare_all(const char *only) {
    struct {
        const char *name;
        Config c;
        int B, path_drop, parts;
    } list[96], *at = list;
#define CASE(text, config, batch, drop, micro)                                                               \
    at->name = text, at->c = config, at->B = batch, at->path_drop = drop, at++->parts = micro
    CASE("small", small_config(), 2, 0, 1);
    CASE("path drop", small_config(), 3, 1, 1);
    CASE("batch 1", small_config(), 1, 0, 1);
    // Products with K = 1, N = 1, as in nano. (In bf16 the measure for the last bias, one number, would
    // be the luck of one rounding: 6e-5 of it in the run that sets the measure, 5e-4 on the GPU.)
    if (sizeof(gpu::floatX) == 4) {
        CASE("patches of one number", small_config(), 2, 0, 1);
        at[-1].c.in_channels = at[-1].c.patch_size = 1;
    }
    CASE("two micro-batches", small_config(), 2, 0, 2);
    CASE("two, path drop", small_config(), 2, 1, 2);
    CASE("65 tokens", long_config(8, 128, 2), 2, 0, 1);
    CASE("65 tokens, path drop", long_config(8, 128, 2), 2, 1, 1);
    CASE("197 tokens", long_config(14, 64, 1), 1, 0, 1);
    CASE("257 tokens", long_config(16, 64, 1), 1, 0, 1);
    CASE("325 tokens", long_config(18, 64, 1), 1, 0, 1);
    CASE("one token kept", small_config(), 2, 0, 1);
    at[-1].c.drop_ratio = 1;
    CASE("one token kept, wide heads", long_config(8, 128, 2), 2, 0, 1);
    at[-1].c.drop_ratio = 1;
    CASE("all tokens kept", small_config(), 2, 0, 1);
    at[-1].c.routing = 0;
    CASE("width 84, heads of 28", small_config(), 2, 0, 1);
    at[-1].c.hidden_size = 84, at[-1].c.mlp_ratio = 1.3;
    CASE("width 832", small_config(), 2, 0, 1);   // the norm's backward shares the columns from 768 on
    at[-1].c.depth = at[-1].c.num_f = 1, at[-1].c.num_h = at[-1].c.align = 0;
    at[-1].c.hidden_size = 832, at[-1].c.num_heads = 13, at[-1].c.mlp_ratio = 0.5;
    CASE("heads of 128", small_config(), 2, 0, 1);
    at[-1].c.hidden_size = 128, at[-1].c.num_heads = 1;
    CASE("no sparse block", small_config(), 2, 0, 1);
    at[-1].c.depth = 4;
    CASE("no decoder block", small_config(), 2, 0, 1);
    at[-1].c.num_h = 0;
    CASE("one block", small_config(), 2, 0, 1);
    at[-1].c.depth = at[-1].c.num_f = 1, at[-1].c.num_h = 0;
    CASE("MLP widths", small_config(), 2, 0, 1);
    at[-1].c.mlp_widths.count = 2, at[-1].c.mlp_widths.x[0] = 2, at[-1].c.mlp_widths.x[1] = 8;
    for (int k = 0; k < 12; k++) {   // f: blocks 1, 2; g: 3 to 5 (without a decoder: to 7); h: 6, 7
        static const Series depths[] = {{3, {2, 4, 6}}, {2, {1, 4}}, {2, {3, 7}}, {2, {2, 7}}};
        static char text[12][96];
        const Series *own = &depths[k / 3];
        int drop = k % 3 > 0;
        snprintf(text[k], sizeof(text[k]), "%s%saligned at %g and %g%s", k % 3 == 2 ? "65 tokens, " : "",
                 k / 3 == 3 ? "no decoder, " : "", own->x[0], own->x[own->count - 1],
                 drop ? ", path drop" : "");
        CASE(text[k], k % 3 == 2 ? long_config(8, 128, 2) : small_config(), 2, drop, 1 + (k % 3 == 1));
        at[-1].c.depth = 7, at[-1].c.num_f = 2, at[-1].c.num_h = k / 3 == 3 ? 0 : 2;
        at[-1].c.align_depths = *own;
    }
    CASE("recipe srdit13", later_config(), 2, 0, 2);
    CASE("recipe srdit13, path drop", later_config(), 2, 1, 2);
    CASE("Muon, two micro-batches", small_config(), 2, 0, 2);
    at[-1].c.optimizer = MUON, at[-1].c.muon_lr = 0.05;
    for (int k = 0; k < 4; k++) {
        static const char *const muon[] = {"Muon", "Muon for all", "Muon, path drop", "Muon, 65 tokens"};
        CASE(muon[k], k == 3 ? long_config(8, 128, 2) : small_config(), 2, k == 2, 1);
        at[-1].c.optimizer = MUON, at[-1].c.muon = k == 1 ? SRDIT13 : SPLIT;
        at[-1].c.muon_lr = 0.05, at[-1].c.weight_decay = 0.1, at[-1].c.muon_weight_decay = 0.2;
    }
    static char names[2 * CONFIG_OPTIONS][64];
    for (int i = 0; i < 2 * CONFIG_OPTIONS; i++) {
        const Option *technique = &config_options[i / 2];
        if (technique->kind != TECHNIQUE) continue;
        snprintf(names[i], sizeof(names[i]), "%sno %s", i % 2 ? "65 tokens, " : "", technique->name);
        CASE(names[i], i % 2 ? long_config(8, 64, 1) : small_config(), 2, 0, 1);
        switch_off(&at[-1].c, technique->name);
    }
#undef CASE
    for (int i = 0; i < at - list; i++)
        if (strstr(list[i].name, only))
            compare_step(list[i].name, &list[i].c, list[i].B, list[i].path_drop, list[i].parts);
}

// A small model of the digits, for tests that train
static Config digits_config(const Data *d, int heads) {
    Config c = small_config();
    model_preset(&c, "nano");
    c.depth = 3, c.num_f = c.num_h = 1, c.num_heads = heads, c.in_channels = d->C, c.input_size = d->S;
    c.num_classes = d->K, c.z_dim = d->Z, c.patch_size = 1, c.projector_dim = 64, c.lr = 5e-4;
    return c;
}

// 200 steps from the same start on the same data and draws; the GPU draws its noise and its tokens itself.
// The mean loss of every 20 steps stays within half a percent of the CPU's.
static void test_training(void) {
    char *path[] = {(char *)"data/digits.safetensors"};
    Data *d = data_open(path, 1);
    Config c = digits_config(d, 1);
    const Backend *both[2] = {&cpu_backend, &gpu_backend};
    double loss[2][10] = {{0}}, worst = 0;
    for (int k = 0; k < 2; k++) {
        Model *m = both[k]->create(&c, 4, 3);
        Batch *b = batch_create(&c, 4);
        b->on_device = k;
        for (int step = 0; step < 200; step++) {
            batch_load(b, d, &c, 7, step, 0, 4);
            both[k]->zero_gradients(m), both[k]->forward_backward(m, b), both[k]->update(m, step + 1);
            loss[k][step / 20] += both[k]->read_losses(m).total / 20;
        }
        batch_free(b), both[k]->destroy(m);
    }
    for (int i = 0; i < 10; i++) {
        double off = fabs(loss[1][i] / loss[0][i] - 1);
        if (getenv("SHOW"))
            printf("     steps %3d to %3d: CPU %.5f GPU %.5f, %.3f %%\n", 20 * i + 1, 20 * i + 20, loss[0][i],
                   loss[1][i], 100 * off);
        worsens(&worst, off);
    }
    result(worst <= 0.005, "200 steps",
           "loss %.4f to %.4f on the CPU, to %.4f on the GPU; at most %.3f %% apart (allowed 0.5)",
           loss[0][0], loss[0][9], loss[1][9], 100 * worst);
    data_close(d);
}

// The GPU's own draws are the CPU's: the same tokens, the same noise to rounding, v_before too
static void draws_alike(int immiscible) {
    char *path[] = {(char *)"data/digits.safetensors"};
    Data *d = data_open(path, 1);
    Config c = digits_config(d, 1);
    c.immiscible = immiscible;
    int B = 3, wrong = 0;
    Model *m = gpu_backend.create(&c, B, 3);
    gpu::GpuModel *g = gpu::gpu_of(m);
    Batch *b = batch_create(&c, B), *on_gpu = batch_create(&c, B);
    batch_load(b, d, &c, 7, 5, 3, 9);
    on_gpu->on_device = 1;
    batch_load(on_gpu, d, &c, 7, 5, 3, 9);
    gpu_backend.forward_backward(m, on_gpu);
    size_t n = (size_t)(B * latent_of(&c)), Z = (size_t)(B * c.z_dim), k = (size_t)(B * kept_of(&c));
    real *x = (real *)alloc_zero(n + Z, sizeof(real));
    int *ids = (int *)alloc_zero(k, sizeof(int));
    double worst = 0;
    cudaMemcpy(x, g->in.noise, n * sizeof(real), cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < n; i++) worsens(&worst, fabs((double)x[i] - b->noise[i]));
    cudaMemcpy(x, g->in.noise_cls, Z * sizeof(real), cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < Z; i++) worsens(&worst, fabs((double)x[i] - b->noise_cls[i]));
    cudaMemcpy(x, g->in.v_before, (size_t)latent_of(&c) * sizeof(real), cudaMemcpyDeviceToHost);
    for (int i = 0; i < latent_of(&c); i++) worsens(&worst, fabs((double)x[i] - b->v_before[i]));
    cudaMemcpy(ids, g->in.ids, k * sizeof(int), cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < k; i++) wrong += ids[i] != b->ids[i];
    for (int i = 0; i < B; i++) wrong += on_gpu->t[i] != b->t[i] || on_gpu->y[i] != b->y[i];
    result(worst < 1e-5 && !wrong, immiscible > 1 ? "draws, immiscible" : "draws",
           "noise within %.1e of the CPU's, %d tokens, times or labels differ", worst, wrong);
    free(x), free(ids), batch_free(b), batch_free(on_gpu), gpu_backend.destroy(m), data_close(d);
}
static void test_draws(void) { draws_alike(1), draws_alike(8); }

// Two runs give the same bits
static void test_same_bits(void) {
    Config c = long_config(8, 128, 2);
    for (int drop = 0; drop < 2; drop++) {
        Outcome *a = run_step(&gpu_backend, &c, 2, drop, 2), *b = run_step(&gpu_backend, &c, 2, drop, 2);
        int differ = 0;
        for (int i = 0; i < a->count; i++)
            differ += memcmp(a->items[i].x, b->items[i].x, a->items[i].n * sizeof(real)) != 0;
        differ += memcmp(&a->losses, &b->losses, sizeof(Losses)) != 0;
        result(!differ, "same bits twice", "%d tensors%s, %d differ", a->count, drop ? ", path drop" : "",
               differ);
        outcome_free(a), outcome_free(b);
    }
}

// x, a small whole number, in a type of 1, 2 or 4 bytes
static void store_as(uint8_t *to, enum Dtype type, size_t i, int x) {
    float single = (float)x;
    uint32_t bits;
    uint16_t half = 0;
    memcpy(&bits, &single, 4);
    if (type == BF16) half = (uint16_t)(bits >> 16);
    for (; type == F16 && half_to_float(half) != single; half++) continue;
    if (type == F32) memcpy(to + 4 * i, &bits, 4);
    else if (type == F16 || type == BF16) memcpy(to + 2 * i, &half, 2);
    else to[i] = (uint8_t)x;
}
// Samples that go to the device as they are stored leave the bits that the host's conversion leaves, for
// every type that kernels convert, with and without CLS, in features of even and odd width
static void test_stored(void) {
    static const enum Dtype pairs[][2] = {{U8, I8}, {I8, F16}, {F16, BF16}, {BF16, I8}, {F32, F32}};
    int differ = 0, taken = 0, count = (int)(sizeof(pairs) / sizeof(pairs[0]));
    for (int k = 0; k < count; k++) {
        Config c = small_config();
        c.z_dim = k == 1 ? 30 : 32, c.cls = k != 2;
        int n = 5, B = 3, Z = c.z_dim, T = patches_of(&c) + 1, C = c.in_channels, S = c.input_size;
        size_t latent = (size_t)latent_of(&c), of_feats = (size_t)(T * Z), feats_at = 4 * 5 * latent,
               cls_at = feats_at + 4 * 5 * of_feats, y_at = cls_at + 4 * 5 * (size_t)Z;
        uint8_t *bytes = (uint8_t *)alloc_zero(1, y_at + 5);
        for (size_t i = 0; i < 5 * latent; i++)
            store_as(bytes, pairs[k][0], i, (int)(philox(1, (uint32_t)i, 0, 0, 0).v[0] % 17));
        for (size_t i = 0; i < 5 * of_feats; i++)
            store_as(bytes + feats_at, pairs[k][1], i, (int)(philox(2, (uint32_t)i, 0, 0, 0).v[0] % 31) - 15);
        for (size_t i = 0; i < 5 * (size_t)Z; i++) store_as(bytes + cls_at, F32, i, (int)(i % 5) - 2);
        for (size_t i = 0; i < 5; i++) bytes[y_at + i] = (uint8_t)(i % 3);
        SafeFile file;
        memset(&file, 0, sizeof(file));
        file.data = bytes;
        SafeTensor tensors[4];
        memset(tensors, 0, sizeof(tensors));
        tensors[0].type = pairs[k][0], tensors[1].type = pairs[k][1], tensors[1].begin = feats_at;
        tensors[2].type = F32, tensors[2].begin = cls_at, tensors[3].type = U8, tensors[3].begin = y_at;
        Shard shard = {&file, &tensors[0], &tensors[3], &tensors[1], &tensors[2], (size_t)n, 0};
        Data d;
        memset(&d, 0, sizeof(d));
        d.shards = &shard, d.shard_count = 1, d.count = (size_t)n, d.scale = 0.125, d.offset = -1;
        d.C = C, d.S = S, d.K = 3, d.tokens = T, d.Z = Z;
        d.latent_type = pairs[k][0], d.feat_type = pairs[k][1];
        Model *m = gpu_backend.create(&c, B, 1);
        randomize(m, 5);
        real *grads[2];
        Losses losses[2];
        for (int stored = 0; stored < 2; stored++) {
            Batch *b = stored ? gpu_backend.batch_in(m, &d, 1) : batch_create(&c, B);
            if (!b) {   // left to the host
                losses[1] = losses[0], grads[1] = (real *)alloc_zero(m->table.total, sizeof(real));
                memcpy(grads[1], grads[0], m->table.total * sizeof(real));
                continue;
            }
            b->on_device = 1, taken += stored;
            gpu_backend.batch_wait(m, 1);
            batch_load(b, &d, &c, 7, 5, 3, 6);
            gpu_backend.zero_gradients(m);
            gpu_backend.forward_backward(m, b);
            losses[stored] = gpu_backend.read_losses(m);
            grads[stored] = (real *)alloc_zero(m->table.total, sizeof(real));
            gpu_backend.get_block(grads[stored], m, GRADS);
            batch_free(b);
        }
        int same = !memcmp(grads[0], grads[1], m->table.total * sizeof(real)) &&
                   !memcmp(&losses[0], &losses[1], sizeof(Losses)) && losses[0].align != 0;
        if (!same)
            printf("     %s latents, %s feats: other bits\n", dtypes[pairs[k][0]].name,
                   dtypes[pairs[k][1]].name);
        differ += !same;
        free(grads[0]), free(grads[1]), free(bytes), gpu_backend.destroy(m);
    }
    int want = sizeof(gpu::floatX) == 4 ? count : count - 1;   // floats are rounded by the host in bf16
    result(!differ && taken == want, "stored samples",
           "%d of %d pairs of types go as they are; %d with other bits", taken, count, differ);
}

// Steps as recorded graphs leave the bits that launch by launch leaves: parts of a batch, paths dropped, both
// buffers of the input, learning rates that change
static void compare_graphs(const char *name, const Config *c) {
    real *end[2];
    Losses losses[2];
    size_t bytes = 0;
    int recorded = 0, graphs = 0;
    for (int on = 0; on < 2; on++) {
        gpu::use_graph = on;
        Model *m = gpu_backend.create(c, 3, 1);
        randomize(m, 5);
        for (int step = 1; step <= 6; step++) {
            gpu_backend.zero_gradients(m);
            for (int part = 0; part < 2; part++) {
                Batch *b = random_batch(c, 3, 3 * part, 6, (uint64_t)step, step % 3 == 0);
                gpu_backend.forward_backward(m, b);
                batch_free(b);
            }
            gpu_backend.update(m, step);
        }
        losses[on] = gpu_backend.read_losses(m);
        bytes = m->table.total * sizeof(real);
        end[on] = (real *)alloc_zero(4, bytes);
        static const enum Block blocks[] = {PARAMS, EMA, ADAM_M, ADAM_V};
        for (int i = 0; i < 4; i++) gpu_backend.get_block(end[on] + i * m->table.total, m, blocks[i]);
        recorded = gpu::gpu_of(m)->recorded;
        for (int i = 0; i < recorded; i++) graphs += gpu::gpu_of(m)->recordings[i].graph != NULL;
        gpu_backend.destroy(m);
    }
    int same = !memcmp(end[0], end[1], 4 * bytes) && !memcmp(&losses[0], &losses[1], sizeof(Losses));
    result(same && graphs == 5 && recorded == 5, name,
           "6 steps, %d of %d kinds replayed: %s those of single launches", graphs, recorded,
           same ? "the bits are" : "NOT");
    gpu::use_graph = 1;
    free(end[0]), free(end[1]);
}
static void test_graph(void) {
    Config c = small_config();
    compare_graphs("graphs", &c);
}
static void test_graph_recipe(void) {
    Config c = later_config();
    compare_graphs("graphs, recipe srdit13", &c);
}
static void test_graph_muon(void) {
    Config c = small_config();
    c.optimizer = MUON, c.muon_lr = 0.05;
    compare_graphs("graphs, Muon split", &c);
}

// The form that newton_schulz has on the GPU, in the type it has there, is no worse than twice the plain one:
// as far from the polynomial in double, of matrices whose singular values fall off evenly, by 1000 in all,
// and of such as have a few large ones above noise.
static double *plain_poly(const double *of, int m, int n, int rounds) {
    size_t wide = (size_t)(m * n), square = (size_t)(m * m);
    double *X = (double *)alloc_zero(wide, sizeof(double)), *Y = (double *)alloc_zero(wide, sizeof(double)),
           *R = (double *)alloc_zero(square, sizeof(double)),
           *P = (double *)alloc_zero(square, sizeof(double));
    auto stored = [=](double x) { return rounds ? (double)(float)(gpu::floatX)(float)x : x; };
    auto product = [=](double *C, const double *A, const double *B, int width, int inner, int turned) {
        for (int i = 0; i < m; i++)
            for (int j = 0; j < width; j++) {
                double sum = 0;
                for (int k = 0; k < inner; k++) {
                    sum += A[i * inner + k] * B[turned ? j * inner + k : k * width + j];
                    if (rounds) sum = (float)sum;
                }
                C[i * width + j] = stored(sum);
            }
    };
    memcpy(X, of, sizeof(double) * wide);
    for (int step = 0; step < 5; step++) {
        const double *poly = muon_classic;
        product(R, X, X, m, n, 1);
        product(P, R, R, m, m, 0);
        for (int i = 0; i < m * m; i++)
            P[i] = stored(poly[1] * R[i] + poly[2] * P[i] + (i % (m + 1) ? 0 : poly[0]));
        product(Y, P, X, n, m, 0);
        memcpy(X, Y, sizeof(double) * wide);
    }
    free(Y), free(R), free(P);
    return X;
}
static void test_muon_form(void) {
    using gpu::check_cuda;   // CHECK calls it
    enum { m = 32, n = 128, few = 4 };
    Config c = small_config();
    c.hidden_size = m, c.num_heads = 4, c.optimizer = MUON;   // whose fc1 has this shape
    Model *model = gpu_backend.create(&c, 1, 1);
    gpu::GpuModel *g = gpu::gpu_of(model);
    real *a = (real *)alloc_zero(m * n, sizeof(real)), *b = (real *)alloc_zero(m * m, sizeof(real));
    double *G = (double *)alloc_zero(m * n, sizeof(double)), share = 0, off[2] = {0, 0};
    gpu::floatX *low = (gpu::floatX *)alloc_zero(m * n, sizeof(gpu::floatX));
    for (int turn = 0; turn < 2; turn++) {
        fill_normal(a, m * n, 3, 108, 0, (uint32_t)turn), fill_normal(b, m * m, 3, 109, 0, (uint32_t)turn);
        double norm = 0;
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                double sum = turn ? 0.3 * a[i * n + j] : 0;
                for (int k = 0; k < (turn ? few : m); k++)
                    sum += b[i * m + k] * a[k * n + j] * (turn ? 1 : pow(10, -3.0 * k / (m - 1)));
                G[i * n + j] = sum, norm += sum * sum;
            }
        for (int i = 0; i < m * n; i++) {
            low[i] = (gpu::floatX)(float)(G[i] / sqrt(norm));
            G[i] = (double)(float)low[i];
        }
        CHECK(cudaMemcpy(g->muon_X[0], low, sizeof(gpu::floatX) * m * n, cudaMemcpyHostToDevice));
        CHECK(cudaStreamSynchronize(gpu::stream));
        const gpu::floatX *got = gpu::newton_schulz(g, m, n, 1);
        CHECK(cudaStreamSynchronize(gpu::stream));
        CHECK(cudaMemcpy(low, got, sizeof(gpu::floatX) * m * n, cudaMemcpyDeviceToHost));
        double *want = plain_poly(G, m, n, 0), *plain = plain_poly(G, m, n, 1), sum[2] = {0, 0}, all = 0;
        for (int i = 0; i < m * n; i++) {
            sum[0] += pow((double)(float)low[i] - want[i], 2), sum[1] += pow(plain[i] - want[i], 2);
            all += want[i] * want[i];
        }
        worsens(&share, sqrt(sum[0] / sum[1]));
        for (int i = 0; i < 2; i++) worsens(&off[i], sqrt(sum[i] / all));
        free(want), free(plain);
    }
    result(share <= 2, "Muon's form", "off by %.1e at most, the plain one by %.1e; %.2f times as far", off[0],
           off[1], share);
    free(a), free(b), free(G), free(low), gpu_backend.destroy(model);
}

// --profile changes no bits, and every launch is in its table: what was timed, and the operations of the
// products that it saw, which are those of the formula with what the padded rows of the fusion and the
// backward add
static void test_profile(void) {
    Config c = small_config();
    real *end[2];
    long launches = 0;
    double flops = 0;
    int lost = 0;
    size_t bytes = 0;
    for (int on = 0; on < 2; on++) {
        Model *m = gpu_backend.create(&c, 3, 1);
        gpu_backend.begin(m, 0, on);
        randomize(m, 5);
        for (int step = 1; step <= 3; step++) {
            Batch *b = random_batch(&c, 3, 0, 3, (uint64_t)step, 0);
            gpu_backend.zero_gradients(m);
            gpu_backend.forward_backward(m, b);
            gpu_backend.update(m, step);
            batch_free(b);
        }
        for (int i = 0; i < gpu::PLACES && on; i++)
            for (int k = 0; k < gpu::WORKS; k++) {
                launches += gpu::profile.spent[i][k].launches, flops += gpu::profile.spent[i][k].flops;
                lost += !(gpu::profile.spent[i][k].ms >= 0);
            }
        lost += gpu::profile.lost;
        if (on) gpu_backend.end(m);
        bytes = m->table.total * sizeof(real);
        end[on] = (real *)alloc_zero(1, bytes);
        gpu_backend.get_block(end[on], m, PARAMS);
        gpu_backend.begin(m, 0, 0);
        gpu_backend.destroy(m);
    }
    double attention = 0;   // no product: 3 forwards' worth in the formula
    for (int i = 0; i < c.depth; i++) {
        double n = is_sparse(&c, i) ? kept_of(&c) : tokens_of(&c);
        attention += 4 * n * n * c.hidden_size;
    }
    double want = 9 * (forward_flops(&c) - attention), off = flops / want - 1;
    int same = !memcmp(end[0], end[1], bytes);
    result(same && !lost && launches > 100 && fabs(off) < 0.05, "profile",
           "%ld launches of one step; operations of the products %.1f %% off the formula; the bits %s",
           launches, 100 * off, same ? "stay" : "CHANGE");
    free(end[0]), free(end[1]);
}

// Where the GELU epilogue is slower the layer is a kernel of its own; where there are no tensor cores'
// shapes, or too little shared memory (99 KB is that of sm_86, 64 that of none), attention goes another way
static void test_other_ways(void) {
    Config c = long_config(8, 128, 2), longer = long_config(16, 64, 1);
    gpu::use_gelu_epilogue = 0;
    compare_step("GELU as its own kernel", &c, 2, 0, 1);
    gpu::use_gelu_epilogue = 1, gpu::use_tensor_attention = 0;
    compare_step("plain attention", &c, 2, 0, 1);
    gpu::use_tensor_attention = 1;
    size_t room = gpu::card.sharedMemPerBlockOptin;
    gpu::card.sharedMemPerBlockOptin = 99 * 1024;
    compare_step("attention, 99 KB of shared memory", &longer, 1, 0, 1);
    gpu::card.sharedMemPerBlockOptin = 64 * 1024;
    compare_step("attention, 64 KB of shared memory", &c, 1, 0, 1);
    gpu::card.sharedMemPerBlockOptin = room;
}

// Attention says at the start where it goes a slower way, and why
static void test_attention_report(void) {
    Config heads = long_config(8, 144, 2), many = long_config(18, 64, 1), no_norm = long_config(8, 64, 1),
           good = long_config(16, 64, 1);
    no_norm.qk_norm = 0;
    struct {
        const Config *c;
        size_t room;
        const char *want;
    } list[] = {{&heads, 227, "heads are 72 wide"}, {&many, 227, "take at most 272"},
                {&no_norm, 227, "need QK-norm"},    {&good, 227, ""},
                {&good, 99, "in two halves"},       {&good, 64, "64 KB of shared memory"}};
    size_t room = gpu::card.sharedMemPerBlockOptin;
    int wrong = 0, in_float = sizeof(gpu::floatX) == 4;
    for (size_t i = 0; i < sizeof(list) / sizeof(*list); i++) {
        char text[512] = "";
        FILE *f = tmpfile();
        if (!f) die("no temporary file: %s", strerror(errno));
        gpu::card.sharedMemPerBlockOptin = list[i].room * 1024;
        gpu::attention_report(f, list[i].c);
        rewind(f);
        size_t n = fread(text, 1, sizeof(text) - 1, f);
        fclose(f);
        int good_text = in_float || !*list[i].want ? n == 0 : strstr(text, list[i].want) != NULL;
        if (!good_text) printf("     not \"%s\": %s", list[i].want, text);
        wrong += !good_text;
    }
    gpu::card.sharedMemPerBlockOptin = room;
    result(!wrong, "what attention says", "%d of %zu wrong", wrong, sizeof(list) / sizeof(*list));
}

// One product of gpu::matmul against loops in double, as cuBLASLt takes it and then with refusals: of the
// bias, of batches too, of everything. `odd`: rows of an odd length in memory. Returns how many of the four
// are wrong.
template <class E>
static int product_wrong(int M, int N, int K, int ta, int tb, int add, int with_bias, int batch, int odd) {
    gpu::GemmKey k = gpu::gemm_key(M, N, K, ta, tb);
    if (odd) k.lda |= 1, k.ldb |= 1, k.ldc |= 1;
    k.add = add, k.batch = batch;
    size_t na = (size_t)(k.lda * (ta ? K : M)), nb = (size_t)(k.ldb * (tb ? N : K)), nc = (size_t)(k.ldc * M);
    if (batch > 1) k.stepa = (int64_t)na, k.stepb = (int64_t)nb, k.stepc = (int64_t)nc, k.step_bias = N;
    na *= (size_t)batch, nb *= (size_t)batch, nc *= (size_t)batch;
    size_t counts[4] = {na, nb, nc, (size_t)(N * batch)};
    real *x[4];
    void *device[4], *host[4];
    for (int i = 0; i < 4; i++) {
        size_t size = i < 2 ? sizeof(gpu::floatX) : sizeof(E);
        x[i] = (real *)alloc_zero(counts[i], sizeof(real));
        host[i] = alloc_zero(counts[i], size);
        fill_normal(x[i], counts[i], 11, 0, 0, (uint32_t)i);
        for (size_t j = 0; j < counts[i]; j++) {
            if (i < 2) x[i][j] = (real)(float)(((gpu::floatX *)host[i])[j] = (gpu::floatX)(float)x[i][j]);
            else x[i][j] = (real)(float)(((E *)host[i])[j] = (E)(float)x[i][j]);
        }
        if (cudaMalloc(&device[i], counts[i] * size)) die("no GPU memory");
        cudaMemcpy(device[i], host[i], counts[i] * size, cudaMemcpyHostToDevice);
    }
    int wrong = 0, first = gpu::plan_count;
    double tolerance = sizeof(E) == 4 ? 2e-5 : 1.0 / 128;
    for (int refuse = 0; refuse < 4; refuse++) {
        for (int i = first; i < gpu::plan_count; i++) {
            gpu::GemmPlan *p = gpu::plans[i];
            p->refused |= refuse == 3 || (refuse && p->key.epilogue != CUBLASLT_EPILOGUE_DEFAULT) ||
                          (refuse == 2 && p->key.batch > 1);
        }
        cudaMemcpy(device[2], host[2], nc * sizeof(E), cudaMemcpyHostToDevice);
        gpu::matmul<E>(k, (E *)device[2], (gpu::floatX *)device[0], (gpu::floatX *)device[1],
                       with_bias ? (E *)device[3] : NULL);
        E *got = (E *)alloc_zero(nc, sizeof(E));
        cudaDeviceSynchronize();
        cudaMemcpy(got, device[2], nc * sizeof(E), cudaMemcpyDeviceToHost);
        int bad = 0;
        for (int b = 0; b < batch; b++)
            for (int i = 0; i < M; i++)
                for (int j = 0; j < k.ldc; j++) {
                    size_t at = (size_t)(b * k.stepc + i * k.ldc + j);
                    double want = add || j >= N ? (double)x[2][at] : 0;   // behind a row nothing is touched
                    for (int l = 0; l < K && j < N; l++)
                        want += (double)x[0][b * k.stepa + (ta ? l * k.lda + i : i * k.lda + l)] *
                                x[1][b * k.stepb + (tb ? j * k.ldb + l : l * k.ldb + j)];
                    if (with_bias && j < N) want += x[3][b * k.step_bias + j];
                    bad += !(fabs((double)(float)got[at] - want) <= tolerance * (1 + fabs(want)));
                }
        wrong += bad != 0;
        free(got);
    }
    for (int i = 0; i < 4; i++) free(x[i]), free(host[i]), cudaFree(device[i]);
    return wrong;
}
// Products that cuBLASLt may refuse, however it takes them, and the kernels that stand in
static void test_products(void) {
    static const int sizes[][3] = {{1, 24, 12}, {24, 1, 40}, {24, 12, 1}, {33, 17, 20}, {16, 48, 64}};
    int wrong = 0, count = 0;
    Config c = small_config();
    gpu_backend.destroy(gpu_backend.create(&c, 1, 1));   // opens the GPU
    for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
        for (int way = 0; way < 32; way++) {
            int ta = way & 1, tb = way >> 1 & 1, add = way >> 2 & 1, odd = way >> 3 & 1,
                batch = way & 16 ? 3 : 1;
            const int *s = sizes[i];
            wrong += product_wrong<float>(s[0], s[1], s[2], ta, tb, add, !add, batch, odd);
            wrong += product_wrong<gpu::floatX>(s[0], s[1], s[2], ta, tb, add, !add, batch, odd);
            count += 8;
        }
    result(!wrong, "products that cuBLASLt may refuse", "%d, %d wrong", count, wrong);
}

// The first step that is not finite changes nothing, nor does any after it; it is told at the next reading,
// however late that is, and the same step on the state that is left shows where it began.
static void test_not_finite(void) {
    Config c = small_config();
    Model *m = gpu_backend.create(&c, 2, 1);
    size_t bytes = m->table.total * sizeof(real);
    real *before = (real *)alloc_zero(1, bytes), *after = (real *)alloc_zero(1, bytes);
    Batch *good = random_batch(&c, 2, 0, 2, 8, 0), *bad = random_batch(&c, 2, 0, 2, 8, 0);
    bad->x[3] = NAN;
    for (int step = 1; step <= 3; step++) {
        gpu_backend.zero_gradients(m);
        gpu_backend.forward_backward(m, step == 2 ? bad : good);
        gpu_backend.update(m, step);
        if (step == 1) gpu_backend.get_block(before, m, PARAMS);
    }
    int first = gpu_backend.read_losses(m).bad_step, again = gpu_backend.read_losses(m).bad_step;
    gpu_backend.get_block(after, m, PARAMS);
    int same = !memcmp(before, after, bytes);
    char name[96];
    gpu_backend.zero_gradients(m);
    gpu_backend.forward_backward(m, bad);
    find_bad(name, &gpu_backend, m, bad);
    result(first == 2 && again == 2 && same && strstr(name, "latents"), "not finite",
           "first at step %d of 3, weights %s, first bad: %s", first,
           same ? "as step 1 left them" : "CHANGED", name);
    free(before), free(after), batch_free(good), batch_free(bad), gpu_backend.destroy(m);
}

// Creation makes every plan of a matrix product that training will ask for (on a GPU it also times them), so
// that no step allocates: neither one with several parts, nor one without the sparse path. It does so on
// random data (a model's first output is zeros) and leaves the parameters as they were.
static void test_plans(void) {
    Config c = small_config();
    c.num_classes = 3;
    Model *m = gpu_backend.create(&c, 3, 1);
    size_t bytes = m->table.total * sizeof(real);
    real *start = (real *)alloc_zero(1, bytes), *after = (real *)alloc_zero(1, bytes);
    gpu_backend.get_block(start, m, PARAMS);
    gpu::tune(gpu::gpu_of(m));
    gpu_backend.get_block(after, m, PARAMS);
    int same = !memcmp(start, after, bytes), zeros = 0;
    const real *out = gpu_backend.activation(m, "out");
    for (int i = 0; i < 3 * latent_of(&c); i++) zeros += !(fabs((double)out[i]) > 0);
    int before = gpu::plan_count;
    for (int step = 1; step <= 4; step++) {
        Batch *b = random_batch(&c, 3, 0, 3, (uint64_t)step, step > 2);
        gpu_backend.zero_gradients(m);
        for (int part = 0; part <= step % 2; part++) gpu_backend.forward_backward(m, b);
        gpu_backend.update(m, step);
        batch_free(b);
    }
    int more = gpu::plan_count - before;
    result(before > 0 && more == 0, "plans before step 1", "%d at creation, %d later", before, more);
    result(same && !zeros, "plans are timed on random data", "%d zeros, parameters afterwards %s", zeros,
           same ? "as before" : "CHANGED");
    free(start), free(after), gpu_backend.destroy(m);
}

// The file of plans: what it holds is not timed again, unless for the other type or on another card
static void test_plan_file(void) {
    char path[] = "/tmp/test_srdit_plans_XXXXXX", line[1024], own[300], was[1024] = "";
    int fd = mkstemp(path), foreign = 0, gelu = 0, in_float = sizeof(gpu::floatX) == 4, timed[4];
    if (fd < 0) die("%s cannot be made: %s", path, strerror(errno));
    close(fd);
    if (getenv("GEMM_PLANS")) snprintf(was, sizeof(was), "%s", getenv("GEMM_PLANS"));
    setenv("GEMM_PLANS", path, 1);
    Config c = small_config();
    c.depth = c.num_f = 1, c.num_h = 0;
    int plan_count = gpu::plan_count;   // those of the other tests
    static gpu::GemmPlan *plans[gpu::MAX_PLANS];
    memcpy(plans, gpu::plans, sizeof(plans));
    Model *m = gpu_backend.create(&c, 2, 1);
    char name[sizeof(gpu::card.name)];
    snprintf(name, sizeof(name), "%s", gpu::card.name);
    for (int turn = 0; turn < 4; turn++) {   // new, again, for the other type, on another card
        if (turn == 0 && truncate(path, 0)) die("%s: %s", path, strerror(errno));
        if (turn == 2) {
            char command[200];
            snprintf(command, sizeof(command), "sed -i 's/%s/%s/' %s", in_float ? ", float," : ", bf16,",
                     in_float ? ", bf16," : ", float,", path);
            if (system(command)) die("sed failed");
        }
        if (turn == 3) snprintf(gpu::card.name, sizeof(gpu::card.name), "another");
        gpu::plan_count = 0;
        gpu::tune(gpu::gpu_of(m));
        timed[turn] = gpu::timed_count;
        if (turn == 0) {
            FILE *f = fopen(path, "r");
            snprintf(own, sizeof(own), "%s, cuBLASLt %zu, %s, ", name, cublasLtGetVersion(),
                     in_float ? "float" : "bf16");
            while (f && fgets(line, sizeof(line), f))
                foreign += strncmp(line, own, strlen(own)) != 0, gelu += strstr(line, "GELU inside") != NULL;
            if (f) fclose(f);
        }
    }
    snprintf(gpu::card.name, sizeof(gpu::card.name), "%s", name);
    memcpy(gpu::plans, plans, sizeof(plans)), gpu::plan_count = plan_count;
    if (*was) setenv("GEMM_PLANS", was, 1);
    else unsetenv("GEMM_PLANS");
    unlink(path);
    gpu_backend.destroy(m);
    // (where cuBLASLt refuses the GELU epilogues there is nothing to choose)
    int good = timed[0] > 0 && timed[1] == 0 && timed[2] == timed[0] && timed[3] == timed[0] && !foreign;
    result(good && (in_float ? gelu == 0 : gelu <= 2), "file of plans",
           "timed %d, again %d, other type %d, other card %d; %d of GELU; %d lines not of this card and type",
           timed[0], timed[1], timed[2], timed[3], gelu, foreign);
}

using gpu::check_cuda;

// The distance of got from want, relative in L2
static double relative(const real *got, const real *want, size_t n) {
    double sum = 0, size = 0;
    for (size_t i = 0; i < n; i++)
        sum += ((double)got[i] - want[i]) * ((double)got[i] - want[i]), size += (double)want[i] * want[i];
    return sqrt(sum / size);
}

static void round_conv(Conv *c) {   // a convolution's panels
    if (c->w) round_bf16(c->w, (size_t)(c->taps * c->taps * c->in) * (size_t)((c->out + NR - 1) / NR * NR));
}
static void round_res(ResBlock *r) { round_conv(&r->conv1), round_conv(&r->conv2), round_conv(&r->shortcut); }
static void round_decoder(Decoder *d) {
    round_conv(&d->post_quant), round_conv(&d->conv_in), round_conv(&d->conv_out);
    round_res(&d->mid1), round_res(&d->mid2);
    for (int l = 0; l < d->levels; l++) {
        for (int i = 0; i < d->blocks; i++) round_res(&d->level[l].block[i]);
        round_conv(&d->level[l].up);
    }
}

// sample.cu's decoder against sample.c's: in float within 1e-4; in bf16 within twice what rounding the
// weights and the maps on the CPU changes. B pictures, at most at_once of them together, in stretches of
// patches that are as short as they can be.
static void compare_decoder(const char *path, int h, int w, int B, int at_once) {
    SafeFile *f = safe_open(path);
    Decoder *d = decoder_open(f, "param."), *rounded = decoder_open(f, "param.");
    size_t in = (size_t)(d->z * h * w), k = (size_t)decoder_factor(d), plane = (size_t)(h * w) * k * k,
           n = (size_t)B * plane * (size_t)d->out_ch;
    const double scale = 0.3, offset = 0.1;
    double *x = (double *)alloc_zero((size_t)B * in, sizeof(double)), *on_device;
    real *z = (real *)alloc_zero((size_t)B * in, sizeof(real)), *want = (real *)alloc_zero(n, sizeof(real)),
         *near = (real *)alloc_zero(n, sizeof(real)), *got = (real *)alloc_zero(n, sizeof(real));
    fill_normal(z, (size_t)B * in, 5, 1, 2, 3);
    for (size_t i = 0; i < (size_t)B * in; i++)
        x[i] = z[i] * scale + offset, z[i] = (real)((x[i] - offset) / scale);
    decoder_decode(want, d, z, B, h, w);
    if (sizeof(gpu::floatX) == 2) {
        round_decoder(rounded);
        decoder_rounds = 1;
        decoder_decode(near, rounded, z, B, h, w);
        decoder_rounds = 0;
    }
    if (!gpu::stream) gpu::device_open();
    size_t patch_bytes = gpu::patch_bytes;
    gpu::patch_bytes = 0;
    gpu::Decoder *g = gpu::decoder_create(d, h, w, at_once);
    gpu::patch_bytes = patch_bytes;
    CHECK(cudaMalloc((void **)&on_device, (size_t)B * in * sizeof(double)));
    CHECK(cudaMemcpy(on_device, x, (size_t)B * in * sizeof(double), cudaMemcpyHostToDevice));
    int C = g->conv_out.out, off = 0;
    size_t batch = (size_t)at_once * plane;
    float *image = (float *)alloc_zero(batch * (size_t)C, sizeof(float));
    uint8_t *pixels = (uint8_t *)alloc_zero(batch, (size_t)d->out_ch);
    for (int b = 0; b < B; b += at_once) {
        int some = imin(at_once, B - b);
        gpu::decoder_decode(g, on_device + (size_t)b * in, d->z, scale, offset, some);
        CHECK(cudaMemcpyAsync(image, g->image, (size_t)some * plane * (size_t)C * sizeof(float),
                              cudaMemcpyDeviceToHost, gpu::stream));
        CHECK(cudaMemcpyAsync(pixels, g->pixels, (size_t)some * plane * (size_t)d->out_ch,
                              cudaMemcpyDeviceToHost, gpu::stream));
        CHECK(cudaStreamSynchronize(gpu::stream));
        for (size_t i = 0; i < (size_t)some * plane; i++)
            for (int c = 0; c < d->out_ch; c++) {
                float v = image[i * (size_t)C + (size_t)c];
                got[(((size_t)b + i / plane) * (size_t)d->out_ch + (size_t)c) * plane + i % plane] = v;
                off += pixels[i * (size_t)d->out_ch + (size_t)c] != pixel_of(v);
            }
    }
    double error = relative(got, want, n),
           may = sizeof(gpu::floatX) == 4 ? 1e-4 : 2 * relative(near, want, n);
    const char *slash = strrchr(path, '/');
    char name[96];
    snprintf(name, sizeof(name), "decoder %s, %d x %d, %d by %d", slash ? slash + 1 : path, h, w, B, at_once);
    result(error <= may && !off, name, "error %.2e, allowed %.2e; %d bytes are not those of the image", error,
           may, off);
    CHECK(cudaFree(on_device));
    gpu::decoder_destroy(g), decoder_close(d), decoder_close(rounded), safe_close(f);
    free(x), free(z), free(want), free(near), free(got), free(image), free(pixels);
}
static void test_decoder(void) {
    compare_decoder("dev/ref/invae_2x.safetensors", 5, 3, 5, 2);
    compare_decoder("dev/ref/invae_2x.safetensors", 9, 12, 1, 1);
    compare_decoder("dev/ref/invae_16x.safetensors", 2, 3, 2, 2);
}

// sample.cu's samplers against those of train_srdit.c and sample.c over the CPU's network: in float within
// 1e-4; in bf16 within twice what the same CPU samplers over the GPU's network are off.
static int ends(int step, const double *x, void *user) {
    int *last = (int *)user, right = step == *last + 1 && x != NULL;
    *last = right ? step : -100;
    return 0;
}
static void compare_sampler(const char *sampler, double cfg, double cls_cfg, int path_drop, double low,
                            int n) {
    enum { STEPS = 6 };
    Config c = small_config();
    Model *cpu = cpu_backend.create(&c, 2 * n, 1), *m = gpu_backend.create(&c, 2 * n, 1);
    randomize(m, 7);
    gpu_backend.get_block(cpu->params, m, PARAMS);
    gpu_backend.get_block(cpu->ema, m, EMA);
    Sampling s = sampling_default();
    s.steps = STEPS, s.cfg = cfg, s.cls_cfg = cls_cfg, s.path_drop = path_drop, s.low = low;
    s.first = 11;
    size_t latent = (size_t)n * (size_t)latent_of(&c), Z = (size_t)n * (size_t)c.z_dim, all = latent + Z;
    real *state[3];
    double *x = (double *)alloc_zero(all, sizeof(double));
    int y[16], last = 0, em = !strcmp(sampler, "em"), solver = solver_of(sampler);
    for (int i = 0; i < n; i++) y[i] = i % c.num_classes;
    for (int k = 0; k < 3; k++) {
        state[k] = (real *)alloc_zero(all, sizeof(real));
        const Backend *which = k ? &gpu_backend : &cpu_backend;
        Model *model = k ? m : cpu;
        if (k < 2) {
            sampler_noise(x, x + latent, &c, &s, 0, n);
            if (em) sample_euler_maruyama(x, x + latent, which, model, &s, y, n, NULL, NULL);
            else sample_ode(x, x + latent, which, model, &s, (enum Solver)solver, y, n, NULL, NULL);
        } else {
            gpu::SamplerWork *w = gpu::sampler_work(&c, n);
            gpu::sample(w, m, &s, sampler, y, n, n == 1 ? 1 : gpu::AHEAD, ends, &last);
            CHECK(cudaMemcpy(x, w->x, latent * sizeof(double), cudaMemcpyDeviceToHost));
            CHECK(cudaMemcpy(x + latent, w->cls, Z * sizeof(double), cudaMemcpyDeviceToHost));
            gpu::sampler_work_free(w);
        }
        for (size_t i = 0; i < all; i++) state[k][i] = (real)x[i];
    }
    char name[96];
    snprintf(name, sizeof(name), "sampler %s, cfg %g, cls %g, path drop %d, from %g, %d", sampler, cfg,
             cls_cfg, path_drop, low, n);
    double may = sizeof(gpu::floatX) == 4 ? 1e-4 : 2 * relative(state[1], state[0], latent),
           may_cls = sizeof(gpu::floatX) == 4 ? 1e-4 : 2 * relative(state[1] + latent, state[0] + latent, Z),
           error = relative(state[2], state[0], latent),
           error_cls = relative(state[2] + latent, state[0] + latent, Z);
    result(error <= may && error_cls <= may_cls && last == STEPS, name,
           "error %.2e, allowed %.2e; CLS %.2e, allowed %.2e; %d steps heard of", error, may, error_cls,
           may_cls, last);
    for (int k = 0; k < 3; k++) free(state[k]);
    free(x), cpu_backend.destroy(cpu), gpu_backend.destroy(m);
}
static void test_sampler(void) {
    compare_sampler("em", 1, 0, 1, 0, 3);
    compare_sampler("em", 2, 0, 1, 0, 1);
    compare_sampler("em", 2, 1.5, 0, 0, 3);
    compare_sampler("em", 3, 1.5, 1, 0.5, 2);
    compare_sampler("euler", 1, 0, 1, 0, 2);
    compare_sampler("heun", 2, 1.5, 1, 0, 3);
    compare_sampler("ab2", 2, 1.5, 1, 0, 3);
}

#ifdef CUDA_ON_CPU
// A card that is too old ends the start with a sentence
static void test_old_card(const char *program) {
    char command[1024], text[512] = "";
    snprintf(command, sizeof(command), "CUDA_CPU_SM=75 '%s' --as-trainer --steps 1 2>&1 >/dev/null", program);
    FILE *f = popen(command, "r");
    if (!f) die("%s cannot be run: %s", program, strerror(errno));
    size_t n = fread(text, 1, sizeof(text) - 1, f);
    int status = pclose(f);
    text[n] = 0;
    result(status != 0 && strstr(text, "7.5, but 8.0 is needed") != NULL, "a card that is too old",
           "status %d, %s", status, text);
}
#endif

#ifdef CUDA_ON_CPU
// How many kernels and matrix products a training step of B/1's twelve blocks is; their width does not count
static void count_launches(const char *name, const Config *c, long most) {
    Model *m = gpu_backend.create(c, 1, 1);
    long launches[2], products[2];
    for (int step = 1; step <= 3; step++) {   // the first also rounds the weights
        int drop = step == 3;
        Batch *b = random_batch(c, 1, 0, 1, 1, drop);
        b->on_device = 1;
        cuda_cpu::launches = cuda_cpu::products = 0;
        gpu_backend.zero_gradients(m), gpu_backend.forward_backward(m, b), gpu_backend.update(m, step);
        launches[drop] = cuda_cpu::launches, products[drop] = cuda_cpu::products;
        batch_free(b);
    }
    result(launches[0] + products[0] <= most, name,
           "%ld kernels, %ld products; %ld and %ld where the sparse path is dropped", launches[0],
           products[0], launches[1], products[1]);
    gpu_backend.destroy(m);
}
static void test_launches(void) {
    static const Series depths = {3, {2, 4, 6}};
    Config c = long_config(4, 64, 1);
    c.depth = 12, c.num_f = c.num_h = 2;
    long most = sizeof(gpu::floatX) == 2 ? MOST_LAUNCHES
                                         : MOST_LAUNCHES_PLAIN;   // float: plain attention, GELU apart
    count_launches("launches a step", &c, most);
    c.align_depths = depths;   // more: roundings, losses, inputs' gradients, weights' as one run more
    count_launches("launches, three depths", &c, most + 2 * 3 + 5);
    // more: a group of one shape has three kernels, five polynomials and 15 products, or 17; AdamW does what
    // lies between
    c.align_depths.count = 0, c.optimizer = MUON;
    count_launches("launches, Muon split", &c, most + 3 * (3 + 5) + 15 + 2 * 17 + 4 * 12 + 1);
}
#endif

//   ./test_srdit_cu              all of it, then the reference files, if it is the build in float
//   ./test_srdit_cu WORDS        the tests and comparisons whose names contain the words
//   ./test_srdit_cu FILE ...     replay these reference files
//   SHOW=1 prints every tensor
int main(int argc, char **argv) {
    double start = now_seconds();
    int in_float = sizeof(gpu::floatX) == 4, files = 0;
    gpu::verbose = 0;
    if (argc > 1 && !strcmp(argv[1], "--as-trainer")) return train_main(argc - 1, argv + 1, backend);
    double tolerance = 0;
    const char *only = "";
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) {
            printf("%s                      all tests\n%s FILE.safetensors ... replay these reference files\n"
                   "%s TEXT                 the tests and comparisons with this text in their name\n"
                   "  --tolerance X   relative error allowed in replays\n",
                   argv[0], argv[0], argv[0]);
            return 0;
        }
        if (!strcmp(argv[i], "--tolerance")) tolerance = tolerance_after(argc, argv, i++);
        else if (!strncmp(argv[i], "--", 2)) die("unknown argument %s (--help lists all)", argv[i]);
        else if (strstr(argv[i], ".safetensors")) replay(argv[i], tolerance, INT_MAX), files++;
        else only = argv[i];
    }
    if (!files) {
        printf("train_srdit.cu, in %s, against the CPU\n", in_float ? "float" : "bf16");
        static const struct {
            const char *name;
            void (*run)(void);
        } tests[] = {{"loader", test_loader},
                     {"stored", test_stored},
                     {"draws", test_draws},
                     {"not finite", test_not_finite},
                     {"plans", test_plans},
                     {"file of plans", test_plan_file},
                     {"products", test_products},
                     {"attention", test_attention_report},
                     {"same bits", test_same_bits},
                     {"graphs", test_graph},
                     {"graphs, recipe", test_graph_recipe},
                     {"graphs, Muon", test_graph_muon},
                     {"Muon's form", test_muon_form},
                     {"profile", test_profile},
                     {"other ways", test_other_ways},
                     {"the decoder", test_decoder},
                     {"sampler", test_sampler},
                     {"200 steps", test_training}};
        for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++)
            if (strstr(tests[i].name, only)) tests[i].run();
#ifdef CUDA_ON_CPU
        if (strstr("launches", only)) test_launches();
#endif
        if (!only[0]) {
#ifdef CUDA_ON_CPU
            test_old_card(argv[0]);
#endif
            glob_t g;
            if (in_float && glob("dev/ref/*.safetensors", 0, NULL, &g) == 0) {
                for (size_t i = 0; i < g.gl_pathc; i++) replay(g.gl_pathv[i], 0, 0);
                globfree(&g);
            }
        }
        compare_all(only);
    }
    printf("\n%.1f s\n%d passed, %d failed\n", now_seconds() - start, passed, failed);
    return failed || !passed;
}
#else

int main(int argc, char **argv) {
    wait_calmly(argv);
    self = "/proc/self/exe";
    if (access(self, X_OK)) self = argv[0];
    if (argc > 1 && !strcmp(argv[1], "--as-trainer")) return train_main(argc - 1, argv + 1, backend);
    if (argc > 2 && !strcmp(argv[1], "--open")) {
        safe_close(safe_open(argv[2]));
        return 0;
    }
    double tolerance = 0, start = now_seconds();
    int files = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) {
            printf("%s                      all tests\n%s FILE ...             replay these reference files\n"
                   "  --tolerance X   relative error allowed, instead of 1e-9 (F64 files) and %.1e (F32 "
                   "files)\n",
                   argv[0], argv[0], tolerance_of());
            return 0;
        }
        if (!strcmp(argv[i], "--tolerance")) {
            tolerance = tolerance_after(argc, argv, i++);
            continue;
        }
        if (!strncmp(argv[i], "--", 2)) die("unknown argument %s (--help lists all)", argv[i]);
        SafeFile *f = safe_open(argv[i]);
        int is_double = 0;
        for (int k = 0; k < f->count; k++) is_double |= !strcmp(f->tensors[k].dtype, "F64");
        safe_close(f);
        if (is_double) replay_double(argv[i], tolerance, INT_MAX, double_counts);
        else replay(argv[i], tolerance, INT_MAX);
        files++;
    }
    if (!files) {
        glob_t g;
        if (glob("dev/ref/*.safetensors", 0, NULL, &g))
            die("no reference files in dev/ref: run this from the project's folder");
        if (!mkdtemp(folder)) die("%s: cannot be made: %s", folder, strerror(errno));
        test_random();
        test_batches();
        test_loader();
        test_functions();
        test_matmul();
        test_immiscible();
        test_newton_schulz();
        for (size_t i = 0; i < g.gl_pathc; i++) {
            SafeFile *f = safe_open(g.gl_pathv[i]);
            const char *dtype = safe_metadata(f, "dtype");
            int is_double = dtype && !strcmp(dtype, "float64");
            safe_close(f);
            if (is_double) replay_double(g.gl_pathv[i], tolerance, 0, double_counts);
            replay(g.gl_pathv[i], tolerance, 0);
        }
        globfree(&g);
        test_accumulation();
        tests_double(double_counts);
        test_runs();
        test_mistakes();
        test_folders();
        test_shards_and_links();
        test_damaged();
        test_comparisons();
        test_late_threads();
        test_names();
        test_types();
        char command[64];
        snprintf(command, sizeof(command), "rm -rf %s", folder);
        if (system(command)) printf("     %s could not be removed\n", folder);
    }
    passed += double_counts[0], failed += double_counts[1];
    printf("\n%.1f s\n%d passed, %d failed\n", now_seconds() - start, passed, failed);
    return failed || !passed;
}
#endif   // TEST_CUDA
#endif
