// What counts as a device's own memory, and what a load puts in between: told by a device that says of itself what a card would.
#include "check.h"
#include "device_memory.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

namespace {

ggml_backend_device card; // the only device that is added
bool                has_events = false;

const char * name_of(ggml_backend_dev_t) { return "CARD"; }
const char * name_of_type(ggml_backend_buffer_type_t) { return "CARD"; }
const char * name_of_reg(ggml_backend_reg_t) { return "CARD"; }
bool         is_host(ggml_backend_buffer_type_t) { return true; }

enum ggml_backend_dev_type type_of(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

void props_of(ggml_backend_dev_t, ggml_backend_dev_props * props) {
    props->type             = GGML_BACKEND_DEVICE_TYPE_GPU;
    props->caps.async       = true;
    props->caps.host_buffer = true;
    props->caps.events      = has_events;
}

ggml_backend_buffer_type_t pinned(ggml_backend_dev_t) {
    static ggml_backend_buffer_type type = { { name_of_type, nullptr, nullptr, nullptr, nullptr, is_host }, &card, nullptr };
    return &type;
}

ggml_backend_buffer_type_t own(ggml_backend_dev_t) {
    static ggml_backend_buffer_type type = { { name_of_type, nullptr, nullptr, nullptr, nullptr, nullptr }, &card, nullptr };
    return &type;
}

ggml_backend_dev_t device_at(ggml_backend_reg_t, size_t) { return &card; }
size_t             one(ggml_backend_reg_t) { return 1; }

} // namespace

int main() {
    CHECK(!is_device_memory(ggml_backend_cpu_buffer_type()), "the host's");
    CHECK(load_staging() == 0, "without a device %llu bytes", (unsigned long long) load_staging());

    static ggml_backend_reg registry = { GGML_BACKEND_API_VERSION, { name_of_reg, one, device_at, nullptr }, nullptr };
    card.reg                         = &registry;
    card.iface.get_name              = name_of;
    card.iface.get_description       = name_of;
    card.iface.get_type              = type_of;
    card.iface.get_props             = props_of;
    card.iface.get_buffer_type       = own;
    card.iface.get_host_buffer_type  = pinned;
    ggml_backend_register(&registry);

    CHECK(is_device_memory(own(&card)), "the card's");
    CHECK(!is_device_memory(pinned(&card)), "pinned memory is the host's");
    CHECK(load_staging() == 0, "the loader needs events");
    has_events = true;
    CHECK(load_staging() > 256u << 20 && load_staging() < 257u << 20, "%llu bytes", (unsigned long long) load_staging());
    return 0;
}
