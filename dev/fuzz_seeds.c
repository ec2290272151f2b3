// Writes small sound files of every kind to a folder, for dev/fuzz_safetensors.sh to damage: a checkpoint, an
// export, a decoder, and reference files of both kinds.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define main test_main
#include "../test_srdit.c"
#undef main
// the tests' other half, over a trainer in double, is left out
void replay_double(const char *path, double tolerance, int most, int counts[2]) {
    (void)path, (void)tolerance, (void)most, (void)counts;
}
void tests_double(int counts[2]) { (void)counts; }

// A model of the least sizes, and data for it of which only the sizes are read
static Config tiny(void) {
    Config c = config_default();
    c.depth = c.num_f = 1, c.num_h = 0, c.hidden_size = 4, c.num_heads = 1, c.patch_size = 1,
    c.in_channels = 1;
    c.input_size = 2, c.num_classes = 2, c.z_dim = c.projector_dim = 2, c.mlp_ratio = 1;
    return c;
}
static void seed_checkpoint(const char *path, int is_export) {
    Training t;
    SafePair pairs[MAX_PAIRS];
    memset(&t, 0, sizeof(t));
    t.c = tiny();
    t.run.model = "nano", t.run.batch = t.run.accum = 1, t.run.steps = 2, t.step = 1;
    t.data = (Data *)alloc_zero(1, sizeof(Data));
    snprintf(t.data->name, sizeof(t.data->name), "x"),
        snprintf(t.data->decoder, sizeof(t.data->decoder), "pixels");
    t.data->scale = 1, t.data->count = 2;
    Model *m = cpu_backend.create(&t.c, 1, 1);
    SafeItem *items = (SafeItem *)alloc_zero(4 * (size_t)m->table.count, sizeof(SafeItem));
    real *zero = (real *)alloc_zero(m->table.total, sizeof(real));
    int count = 0;
    if (is_export) count = items_add(items, 0, &m->table, m->params, "", 1);
    for (int k = 0; k < 4 && !is_export; k++)
        count = items_add(items, count, &m->table, k ? zero : m->params, block_prefix[saved_blocks[k]], 0);
    safe_write(path, pairs, run_pairs(pairs, is_export ? "srdit-export-1" : "srdit-checkpoint-1", &t), items,
               count);
}
// A reference file: the model's parameters as param.*, and what replays of all three kinds take
static void seed_reference(const char *path) {
    static const real zero[64];
    Config c = tiny();
    Model *m = cpu_backend.create(&c, 1, 1);
    OptionTable config = config_table(&c);
    SafePair pairs[MAX_PAIRS];
    SafeItem *items = (SafeItem *)alloc_zero((size_t)m->table.count + 32, sizeof(SafeItem));
    int n = 0, count = items_add(items, 0, &m->table, m->params, "param.", 1);
    pairs[n++] = pair_text("format", "srdit-ref-1");
    for (int i = 0; i < config.count; i++)
        if (!unsaid(&config, i)) pairs[n++] = pair_number(config.options[i].name, option_get(&config, i));
    pairs[n++] = pair_number("steps", 1), pairs[n++] = pair_number("sample_steps", 2);
    pairs[n++] = pair_number("sample_cfg_scale", 2), pairs[n++] = pair_number("sample_cls_cfg_scale", 2);
    const struct {
        const char *name;
        int elements;
    } inputs[] = {{"in.x", 4},         {"in.noise", 4},       {"in.cls", 2},
                  {"in.noise_cls", 2}, {"in.feats", 10},      {"in.t", 1},
                  {"in.y", 1},         {"in.drop", 1},        {"in.path_drop", 1},
                  {"eval.x_t", 4},     {"eval.t", 1},         {"eval.y", 1},
                  {"eval.cls_t", 2},   {"sample.latents", 4}, {"sample.eps", 4},
                  {"sample.y", 1},     {"sample.cls_eps", 2}, {"sample.cls_latents", 2},
                  {"loss.total", 1},   {"eval.v", 4}};
    for (size_t i = 0; i < sizeof(inputs) / sizeof(inputs[0]); i++) {
        SafeItem item = {"", real_dtype(), 2, {1, inputs[i].elements, 0, 0}, zero};
        snprintf(item.name, sizeof(item.name), "%s", inputs[i].name);
        items[count++] = item;
    }
    SafeItem ids = {"in.ids_keep", I32, 2, {1, kept_of(&c), 0, 0}, zero};
    items[count++] = ids;
    safe_write(path, pairs, n, items, count);
}
// The least decoder: one level of one block, with attention; with the prefix "param." a reference file
static SafeItem parts[64];
static int part_count;
static void add(const char *prefix, const char *name, int ndim, int a, int b, int k) {
    static const real zero[64];
    SafeItem item = {"", real_dtype(), ndim, {a, b, k, k}, zero};
    snprintf(item.name, sizeof(item.name), "%s%s", prefix, name);
    parts[part_count++] = item;
}
static void add_pair(const char *prefix, const char *name, int ndim, int out, int in, int k) {
    char full[96];
    snprintf(full, sizeof(full), "%s.weight", name), add(prefix, full, ndim, out, in, k);
    snprintf(full, sizeof(full), "%s.bias", name), add(prefix, full, 1, out, 0, 0);
}
static void seed_decoder(const char *path, const char *prefix) {
    enum { C = 2 };
    static const char *const blocks[] = {"decoder.mid.block_1", "decoder.mid.block_2",
                                         "decoder.up.0.block.0"};
    static const char *const attention[] = {"decoder.mid.attn_1", "decoder.up.0.attn.0"};
    SafePair pairs[] = {pair_text("format", "srdit-ref-1"), pair_text("kind", "invae"),
                        pair_number("num_groups", 1), pair_text("attn_levels", "0")};
    char name[64];
    part_count = 0;
    add_pair(prefix, "post_quant_conv", 4, 1, 1, 1);
    add_pair(prefix, "decoder.conv_in", 4, C, 1, 3);
    for (int i = 0; i < 3; i++)
        for (int k = 1; k <= 2; k++) {
            snprintf(name, sizeof(name), "%s.norm%d", blocks[i], k), add_pair(prefix, name, 1, C, 0, 0);
            snprintf(name, sizeof(name), "%s.conv%d", blocks[i], k), add_pair(prefix, name, 4, C, C, 3);
        }
    for (int i = 0; i < 2; i++) {
        static const char *const inner[] = {"q", "k", "v", "proj_out"};
        snprintf(name, sizeof(name), "%s.norm", attention[i]), add_pair(prefix, name, 1, C, 0, 0);
        for (int k = 0; k < 4; k++)
            snprintf(name, sizeof(name), "%s.%s", attention[i], inner[k]), add_pair(prefix, name, 4, C, C, 1);
    }
    add_pair(prefix, "decoder.norm_out", 1, C, 0, 0);
    add_pair(prefix, "decoder.conv_out", 4, 1, C, 3);
    if (*prefix) add("", "in.z", 4, 1, 1, 1), add("", "out.image", 4, 1, 1, 1);
    safe_write(path, pairs, 4, parts, part_count);
}
int main(int argc, char **argv) {
    if (argc != 2 || chdir(argv[1])) return fputs("usage: seeds FOLDER\n", stderr), 2;
    seed_checkpoint("resume", 0);
    seed_checkpoint("export", 1);
    seed_reference("reference");
    seed_decoder("decoder", "");
    seed_decoder("decoder_reference", "param.");
    return 0;
}
