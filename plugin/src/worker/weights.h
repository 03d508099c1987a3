// The weights of a worker: which ones its file has, and where those lie that its client has asked for.
//
// A client allocates a buffer for all weights of a layer and names each one's place in it. That memory is only used for weights that
// stay as they are in the file. The others lie elsewhere: on flash, in a buffer of the session's, or repacked, in one of their own. An op
// of the client's graph names the address in its buffer; `place` puts the weight there instead.
#pragma once

#include "session.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

// how a worker has a weight
enum class weight_home : uint8_t {
    plain,  // in the client's buffer, as in the file
    matrix, // a matrix of products: in the layout of the stock kernel, which may be the file's
    flash,  // in the file
};

// a weight as the file has it
struct file_weight {
    uint32_t    type;  // enum ggml_type
    int64_t     ne[4]; // elements
    uint32_t    file;  // number of the shard
    uint64_t    offset;
    weight_home home;
};

struct buffer_free {
    void operator()(ggml_backend_buffer_t buffer) const { ggml_backend_buffer_free(buffer); }
};

class worker_weights {
  public:
    // files: descriptors of the shards, which the session reads; closed with it. limit: bytes of weights in memory
    worker_weights(llama_flash_session & session, std::vector<int> files, uint64_t limit) : session(session), files(std::move(files)), limit(limit) {}
    ~worker_weights();
    worker_weights(const worker_weights &)             = delete;
    worker_weights & operator=(const worker_weights &) = delete;

    void add(const std::string & name, const file_weight & weight) { known[name] = weight; }

    // The client's tensor (name, type, shape, address in its buffer) is the weight at this place of the file. false, with the reason:
    // it is not. beside: bytes that count with resident weights.
    bool bind(ggml_tensor & tensor, uint64_t file, uint64_t offset, uint64_t beside, std::string & reason);

    // A tensor of the client's: as it is computed with here. false: it reaches into the memory of a weight that is elsewhere.
    bool place(ggml_tensor & tensor) const;

    // whether it is a weight that is not in the client's buffer
    static bool is_elsewhere(const ggml_tensor & tensor);

    void     drop(ggml_backend_buffer_t buffer);           // it is about to be freed
    uint64_t resident_bytes() const { return n_resident; } // of weights that are not on flash

  private:
    struct bound {
        ggml_tensor                                              at_client; // as it was bound
        ggml_tensor                                              here;
        std::unique_ptr<struct ggml_backend_buffer, buffer_free> own;          // that it lies in, unless that is the client's
        uint64_t                                                 resident = 0; // bytes of memory
    };

    std::string mismatch(const ggml_tensor & tensor, uint64_t file, uint64_t offset) const;
    bool        read(bound & weight, const file_weight & where);
    bool        put_on_flash(bound & weight, const file_weight & where);
    bool        repack(bound & weight, const file_weight & where);

    llama_flash_session &                                  session;
    std::vector<int>                                       files;
    const uint64_t                                         limit;
    std::unordered_map<std::string, file_weight>           known;
    std::unordered_map<std::string, ggml_backend_buffer_t> taken;     // the client's buffers, by the weights that were bound in them
    std::map<uintptr_t, bound>                             elsewhere; // by the address in the client's buffer
    std::unordered_map<ggml_backend_buffer_t, uint64_t>    owners;    // resident bytes by the client's buffer
    uint64_t                                               n_resident = 0;
};
