// Kernels that treat tokens: their embeddings, and loops among them.

template <class Table, class Out>
void embed_tokens(const EmbedJob& job, int64_t token, int64_t token_end) {
  for (; token < token_end; ++token) {
    const Table* row = static_cast<const Table*>(job.table) + job.ids[token] * job.width;
    Out* out = static_cast<Out*>(job.out) + token * job.width;
    for_each_vec(job.width, [&](int64_t i, auto get, auto put) { put(out + i, get(row + i)); });
  }
}

void embed(const EmbedJob& job, int64_t token, int64_t token_end) {
  const bool out32 = job.storage == Storage::kFloat32;
  if (job.table_storage == Storage::kFloat32) {
    (out32 ? embed_tokens<float, float> : embed_tokens<float, bf16>)(job, token, token_end);
  } else {
    (out32 ? embed_tokens<bf16, float> : embed_tokens<bf16, bf16>)(job, token, token_end);
  }
}

// runs[p - 1] counts the newest tokens that equal the one p before them. Plain loops over whole numbers: the
// compiler makes vectors of each instruction set of them.
int64_t find_loop(const LoopJob& job) {
  int32_t* runs = job.runs;
  const int32_t newest = job.newest;
  for (int64_t i = 0; i < job.count; ++i) runs[i] = job.earlier[i] == newest ? runs[i] + 1 : 0;
  for (int64_t i = 0; i < job.periods; ++i) {
    // A run of r tokens at period p means r + p tokens in the loop, r / p + 1 passes through it.
    const int64_t period = i + 1, for_repeats = period * (job.min_repeats - 1),
                  for_tokens = job.min_tokens - period;
    const int64_t needed = for_repeats > for_tokens ? for_repeats : for_tokens;
    if (runs[i] >= (needed > 1 ? needed : 1)) return runs[i];
  }
  return 0;
}
