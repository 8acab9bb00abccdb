/* Network address translation of TCP and UDP as routers do it, in the words of RFC 4787 and RFC 5382.
 *
 * A router keeps a table of sessions: who behind it speaks from which public port with whom. A mapping is the sessions
 * that share a public port, and what may come in is asked of the same sessions. Packets of other protocols and fragments
 * do not pass. A session ends after some idle time; packets in both directions put that off.
 */
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SESSIONS = 1024, MAX_FORWARDS = 64, SYN = 2, RST = 4, ACK = 16 };

/* For which remotes a mapping is used again, and from which ones packets may come in. */
typedef enum { ANY_REMOTE, SAME_ADDRESS, SAME_ADDRESS_AND_PORT, KINDS } Kind;

typedef struct {
    uint64_t until; /* ns; 0 and the past: free */
    uint32_t address, remote;
    uint16_t port, remote_port, public_port;
    uint8_t protocol;
} Session;

typedef struct {
    uint8_t protocol; /* 0: free */
    uint16_t public_port, port;
    uint32_t address;
} Forward;

typedef struct {
    uint32_t address; /* the public one */
    Kind mapping, filtering;
    bool random_ports, hairpin, reset; /* whether a filtered SYN is answered with RST */
    uint64_t udp_idle_ns, tcp_idle_ns;
    Session session[MAX_SESSIONS];
    Forward forward[MAX_FORWARDS];
} Nat;

static uint16_t get16(const unsigned char *at) { return at[0] << 8 | at[1]; }
static uint32_t get32(const unsigned char *at) { return (uint32_t)get16(at) << 16 | get16(at + 2); }
static void put16(unsigned char *at, uint16_t value) { at[0] = value >> 8, at[1] = value; }
static void put32(unsigned char *at, uint32_t value) { put16(at, value >> 16), put16(at + 2, value); }

static uint16_t folded(uint32_t sum) {
    while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}

/* RFC 1624, equation 3. */
static void update_checksum(unsigned char *checksum, uint16_t before, uint16_t after) {
    put16(checksum, ~folded((uint16_t)~get16(checksum) + (uint16_t)~before + after));
}

/* The TCP or UDP header of an IPv4 packet; NULL if it has none, or is a fragment. */
static unsigned char *transport(unsigned char *bytes, int length) {
    int header = 4 * (bytes[0] & 15), least = bytes[9] == IPPROTO_TCP ? 20 : 8;
    bool whole = !(get16(bytes + 6) & 0x3fff);
    if (header < 20 || length < header + least || !whole) return NULL;
    return bytes[9] == IPPROTO_TCP || bytes[9] == IPPROTO_UDP ? bytes + header : NULL;
}

static bool is_syn(const unsigned char *bytes, const unsigned char *ports) {
    return bytes[9] == IPPROTO_TCP && (ports[13] & (SYN | RST | ACK)) == SYN;
}

/* Replaces the source or the destination. */
static void replace(unsigned char *bytes, unsigned char *ports, bool source, uint32_t address, uint16_t port) {
    unsigned char *old_address = bytes + (source ? 12 : 16), *old_port = ports + (source ? 0 : 2);
    unsigned char *checksum = ports + (bytes[9] == IPPROTO_TCP ? 16 : 6);
    uint16_t before[3] = {get16(old_address), get16(old_address + 2), get16(old_port)};
    uint16_t after[3] = {address >> 16, address, port};
    bool summed = bytes[9] == IPPROTO_TCP || get16(checksum); /* UDP may go without */
    for (int i = 0; i < 3; i++) {
        if (i < 2) update_checksum(bytes + 10, before[i], after[i]); /* of the IP header */
        if (summed) update_checksum(checksum, before[i], after[i]);
    }
    if (summed && bytes[9] == IPPROTO_UDP && !get16(checksum)) put16(checksum, 0xffff);
    put32(old_address, address);
    put16(old_port, port);
}

static bool same_remote(Kind kind, const Session *a, const Session *b) {
    return kind == ANY_REMOTE || (a->remote == b->remote && (kind == SAME_ADDRESS || a->remote_port == b->remote_port));
}

/* A session like `key` from its private address and port, or with its public port; as to the remote, see Kind. */
static Session *find_session(Nat *nat, const Session *key, bool going_out, Kind kind, uint64_t now) {
    for (int i = 0; i < MAX_SESSIONS; i++) {
        Session *session = &nat->session[i];
        if (session->until <= now || session->protocol != key->protocol || !same_remote(kind, session, key)) continue;
        if (going_out ? session->address != key->address || session->port != key->port
                      : session->public_port != key->public_port)
            continue;
        Session found = *session; /* to the front: the busy ones are found soon */
        *session = nat->session[0];
        nat->session[0] = found;
        return nat->session;
    }
    return NULL;
}

/* Takes the place of the session that ends first, which mostly has ended. */
static Session *add_session(Nat *nat, const Session *key) {
    Session *first = nat->session;
    for (int i = 1; i < MAX_SESSIONS; i++)
        if (nat->session[i].until < first->until) first = &nat->session[i];
    *first = *key;
    return first;
}

static Forward *find_forward(Nat *nat, uint8_t protocol, uint16_t public_port) {
    for (int i = 0; i < MAX_FORWARDS; i++)
        if (nat->forward[i].protocol == protocol && nat->forward[i].public_port == public_port) return &nat->forward[i];
    return NULL;
}

static uint16_t choose_port(Nat *nat, const Session *key, uint64_t now) {
    Session wanted = *key;
    wanted.public_port = key->port;
    for (int i = 0; i < MAX_FORWARDS && nat->mapping == ANY_REMOTE; i++) {
        Forward *forward = &nat->forward[i];
        if (forward->protocol == key->protocol && forward->address == key->address && forward->port == key->port)
            return forward->public_port;
    }
    if (nat->random_ports) wanted.public_port = 1024 + lrand48() % 64512;
    while (find_session(nat, &wanted, false, ANY_REMOTE, now) || find_forward(nat, key->protocol, wanted.public_port))
        wanted.public_port = 1024 + lrand48() % 64512;
    return wanted.public_port;
}

static uint64_t end_of(const Nat *nat, const Session *session, uint64_t now) {
    return now + (session->protocol == IPPROTO_TCP ? nat->tcp_idle_ns : nat->udp_idle_ns);
}

/* Gives a packet from behind the router its public source; false: the router drops it. */
static bool translate_out(Nat *nat, unsigned char *bytes, int length, uint64_t now) {
    unsigned char *ports = transport(bytes, length);
    if (!ports) return false;
    Session key = {.protocol = bytes[9], .address = get32(bytes + 12), .port = get16(ports)};
    key.remote = get32(bytes + 16), key.remote_port = get16(ports + 2);
    Session *session = find_session(nat, &key, true, SAME_ADDRESS_AND_PORT, now);
    if (!session) {
        if (key.protocol == IPPROTO_TCP && !is_syn(bytes, ports)) return false;
        Session *mapping = find_session(nat, &key, true, nat->mapping, now);
        key.public_port = mapping ? mapping->public_port : choose_port(nat, &key, now);
        session = add_session(nat, &key);
    }
    session->until = end_of(nat, session, now);
    replace(bytes, ports, true, nat->address, session->public_port);
    return true;
}

/* Gives a packet for the public address its destination behind the router; false: it is filtered. */
static bool translate_in(Nat *nat, unsigned char *bytes, int length, uint64_t now) {
    unsigned char *ports = transport(bytes, length);
    if (!ports) return false;
    Session key = {.protocol = bytes[9], .remote = get32(bytes + 12), .remote_port = get16(ports)};
    key.public_port = get16(ports + 2);
    Session *session = find_session(nat, &key, false, SAME_ADDRESS_AND_PORT, now);
    if (!session) {
        if (key.protocol == IPPROTO_TCP && !is_syn(bytes, ports)) return false;
        Forward *forward = find_forward(nat, key.protocol, key.public_port);
        Session *mapping = forward ? NULL : find_session(nat, &key, false, nat->filtering, now);
        if (!forward && !mapping) return false;
        key.address = forward ? forward->address : mapping->address;
        key.port = forward ? forward->port : mapping->port;
        session = add_session(nat, &key);
    }
    session->until = end_of(nat, session, now);
    replace(bytes, ports, false, session->address, session->port);
    return true;
}

/* Writes the RST that answers a SYN, 40 bytes; false if the packet is none. */
static bool refuse_syn(unsigned char *bytes, int length, unsigned char answer[40]) {
    unsigned char *ports = transport(bytes, length);
    if (!ports || !is_syn(bytes, ports)) return false;
    unsigned char header[20] = {0x45, [3] = 40, [8] = 64, [9] = IPPROTO_TCP};
    memset(answer, 0, 40);
    memcpy(answer, header, 20);
    memcpy(answer + 12, bytes + 16, 4);
    memcpy(answer + 16, bytes + 12, 4);
    memcpy(answer + 20, ports + 2, 2);
    memcpy(answer + 22, ports, 2);
    put32(answer + 28, get32(ports + 4) + 1);
    answer[32] = 5 << 4; /* its length in words */
    answer[33] = RST | ACK;
    uint32_t sum = 0;
    for (int i = 0; i < 20; i += 2) sum += get16(answer + i);
    put16(answer + 10, ~folded(sum));
    sum = IPPROTO_TCP + 20; /* the pseudo-header, with the addresses */
    for (int i = 12; i < 40; i += 2) sum += get16(answer + i);
    put16(answer + 36, ~folded(sum));
    return true;
}
