// The tracks' rules as numbers: the one place where they stand. The trainers read this table, and so does
// verify.py, which wants an entry a line: {"track", "rule", "value"}. Track * holds what all tracks share.
//
//   rank        what is raced for: none, samples (fewest seen), ratio (time, of the baseline's on the same
//               machine in the same sitting), H100-hours; all, to a mean metric below the target
//   runs        runs of an entry, with the seeds that verify.py draws; each counts
//   steps       of a run, where the track fixes them
//   baseline    the settings of a run that says nothing else, where they are not the preset's
//   may_set     settings that the command line may give, by their flags' names; all others are fixed
//   target      "not fixed yet" until targets.py has measured the baseline; sigma, the deviation between
//               seeds, likewise
//   copies      at most this share of the pictures may lie nearer to a training picture than 99 % of the
//               held-out ones do; of held-out pictures it is 0.01
//   closed      why the trainer does not run this track; absent where it does
#ifndef SRDIT_TRACKS_H
#define SRDIT_TRACKS_H

static const struct {
    const char *track, *rule, *value;
} track_rules[] = {
    {"*", "log_every", "10"},
    {"*", "recipe",
     "lr beta1 beta2 eps weight_decay max_grad_norm ema_decay ema_warmup drop_ratio "
     "optimizer muon muon_lr muon_momentum muon_weight_decay align_depths immiscible mlp_widths "
     "class_dropout_prob path_drop_prob cls_coeff align_coeff cfm_coeff shift_base "
     "routing path_drop align cls cfm qk_norm rope value_residual time_shift label_dropout ema"},
    {"*", "sizes", "depth hidden_size num_heads patch_size projector_dim num_f num_h mlp_ratio"},
    {"*", "always", "track seed out"},

    // A few seconds, for trying the tools; what is called practice has no board.
    {"practice", "rank", "none"},
    {"practice", "runs", "3"},
    {"practice", "model", "nano"},
    {"practice", "may_set", "recipe sizes batch threads accum"},
    {"practice", "data", "data/digits.safetensors"},
    {"practice", "data_sha256", "9d61d74b0d623d3bce3a15b7c5e45ba013f9cabd8f0c7e645a70157ca4f8cb73"},
    {"practice", "judge", "data/digits_encoder.safetensors"},
    {"practice", "judge_sha256", "5ef8452daf34e332ab2454376ca27c30c1da5f962f7a1522551b50574cd52f10"},
    {"practice", "steps", "12"},
    {"practice", "pictures", "40"},
    {"practice", "sampler", "em"},
    {"practice", "sample_steps", "4"},
    {"practice", "metric", "frechet"},
    {"practice", "target", "not fixed yet"},
    {"practice", "sigma", "not measured yet"},
    {"practice", "copies", "0.02"},
    {"practice", "parameters", "600000"},
    {"practice", "memory_mb", "2000"},

    {"practice-ratio", "rank", "ratio"},
    {"practice-ratio", "runs", "2"},
    {"practice-ratio", "model", "nano"},
    {"practice-ratio", "may_set", "recipe sizes batch accum"},
    {"practice-ratio", "threads", "2"},
    {"practice-ratio", "data", "data/digits.safetensors"},
    {"practice-ratio", "data_sha256", "9d61d74b0d623d3bce3a15b7c5e45ba013f9cabd8f0c7e645a70157ca4f8cb73"},
    {"practice-ratio", "judge", "data/digits_encoder.safetensors"},
    {"practice-ratio", "judge_sha256", "5ef8452daf34e332ab2454376ca27c30c1da5f962f7a1522551b50574cd52f10"},
    {"practice-ratio", "steps", "12"},
    {"practice-ratio", "pictures", "40"},
    {"practice-ratio", "sampler", "em"},
    {"practice-ratio", "sample_steps", "4"},
    {"practice-ratio", "metric", "frechet"},
    {"practice-ratio", "target", "not fixed yet"},
    {"practice-ratio", "sigma", "not measured yet"},
    {"practice-ratio", "copies", "0.02"},
    {"practice-ratio", "parameters", "600000"},
    {"practice-ratio", "memory_mb", "2000"},

    // Hello: runs anywhere in about a minute. The digits' judge is also the teacher of their features, so
    // that a score here says that the program works, and little about pictures.
    {"digits", "rank", "none"},
    {"digits", "runs", "10"},
    {"digits", "model", "nano"},
    {"digits", "may_set", "recipe sizes batch threads accum"},
    {"digits", "data", "data/digits.safetensors"},
    {"digits", "data_sha256", "9d61d74b0d623d3bce3a15b7c5e45ba013f9cabd8f0c7e645a70157ca4f8cb73"},
    {"digits", "judge", "data/digits_encoder.safetensors"},
    {"digits", "judge_sha256", "5ef8452daf34e332ab2454376ca27c30c1da5f962f7a1522551b50574cd52f10"},
    {"digits", "steps", "300"},
    {"digits", "pictures", "500"},
    {"digits", "sampler", "em"},
    {"digits", "sample_steps", "20"},
    {"digits", "metric", "frechet"},
    {"digits", "target", "4.69"},
    {"digits", "sigma", "0.333"},
    {"digits", "copies", "0.02"},
    {"digits", "parameters", "600000"},
    {"digits", "memory_mb", "2000"},

    // Minutes, for trying an idea before a race: fewer pictures, so that scores lie higher than there
    {"practice-fashion", "rank", "none"},
    {"practice-fashion", "runs", "5"},
    {"practice-fashion", "model", "fashion"},
    {"practice-fashion", "may_set", "recipe sizes batch steps threads accum"},
    {"practice-fashion", "data", "data/fashion_mnist.safetensors"},
    {"practice-fashion", "data_sha256", "2c416317282a8acb7f8d1db2da486e5ef95b3af0c44906ead853f6903a167084"},
    {"practice-fashion", "judge", "data/fashion_mnist_judge.safetensors"},
    {"practice-fashion", "judge_sha256", "cce3542feb3f955cf21842f670f36669532ebcfe5f53b6242905d4e1afa55e1b"},
    {"practice-fashion", "baseline", "steps=500 batch=32 lr=0.002"},
    {"practice-fashion", "pictures", "1500"},
    {"practice-fashion", "sampler", "ab2"},
    {"practice-fashion", "sample_steps", "6"},
    {"practice-fashion", "metric", "frechet"},
    {"practice-fashion", "target", "not fixed yet"},
    {"practice-fashion", "sigma", "not measured yet"},
    {"practice-fashion", "copies", "0.02"},
    {"practice-fashion", "parameters", "3000000"},
    {"practice-fashion", "memory_mb", "16000"},

    // Teacher and judge are two networks that share nothing but the training pictures (data/README.md).
    {"fashion-steps", "rank", "samples"},
    {"fashion-steps", "runs", "10"},
    {"fashion-steps", "model", "fashion"},
    {"fashion-steps", "may_set", "recipe batch steps threads accum"},
    {"fashion-steps", "data", "data/fashion_mnist.safetensors"},
    {"fashion-steps", "data_sha256", "2c416317282a8acb7f8d1db2da486e5ef95b3af0c44906ead853f6903a167084"},
    {"fashion-steps", "judge", "data/fashion_mnist_judge.safetensors"},
    {"fashion-steps", "judge_sha256", "cce3542feb3f955cf21842f670f36669532ebcfe5f53b6242905d4e1afa55e1b"},
    {"fashion-steps", "baseline", "steps=500 lr=0.002"},
    {"fashion-steps", "pictures", "5000"},
    {"fashion-steps", "sampler", "heun"},
    {"fashion-steps", "sample_steps", "6"},
    {"fashion-steps", "metric", "frechet"},
    {"fashion-steps", "target", "8.77"},
    {"fashion-steps", "sigma", "0.318"},
    {"fashion-steps", "copies", "0.02"},
    {"fashion-steps", "parameters", "2000000"},
    {"fashion-steps", "memory_mb", "16000"},

    {"fashion-cpu", "rank", "ratio"},
    {"fashion-cpu", "runs", "10"},
    {"fashion-cpu", "model", "fashion"},
    {"fashion-cpu", "may_set", "recipe sizes batch steps accum"},
    {"fashion-cpu", "threads", "2"},
    {"fashion-cpu", "data", "data/fashion_mnist.safetensors"},
    {"fashion-cpu", "data_sha256", "2c416317282a8acb7f8d1db2da486e5ef95b3af0c44906ead853f6903a167084"},
    {"fashion-cpu", "judge", "data/fashion_mnist_judge.safetensors"},
    {"fashion-cpu", "judge_sha256", "cce3542feb3f955cf21842f670f36669532ebcfe5f53b6242905d4e1afa55e1b"},
    {"fashion-cpu", "baseline",
     "steps=500 batch=16 lr=0.002 optimizer=muon muon_lr=0.02 label_dropout=0 path_drop=0"},
    {"fashion-cpu", "pictures", "5000"},
    {"fashion-cpu", "sampler", "ab2"},
    {"fashion-cpu", "sample_steps", "6"},
    {"fashion-cpu", "metric", "frechet"},
    {"fashion-cpu", "target", "8.71"},
    {"fashion-cpu", "sigma", "0.474"},
    {"fashion-cpu", "copies", "0.02"},
    {"fashion-cpu", "parameters", "2000000"},
    {"fashion-cpu", "memory_mb", "16000"},

    {"imagenet-256", "closed",
     "its FID is measured by the ADM evaluator, outside of this program, and nobody has "
     "trained on ImageNet with it yet"},
    {"imagenet-256", "rank", "H100-hours"},
    {"imagenet-256", "runs", "1"},
    {"imagenet-256", "metric", "FID-50K, unguided, 250 steps, balanced labels"},
    {"imagenet-256", "target", "3.49"},
    {"imagenet-256", "sigma", "not measured yet"},
    {"imagenet-256", "parameters", "145000000"},
};
enum { TRACK_RULES = sizeof(track_rules) / sizeof(track_rules[0]) };
#endif
