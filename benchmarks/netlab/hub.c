/* The network between the hosts of a lab, in one process and without kernel modules.
 *
 *     hub HOST HOST ... < commands
 *
 * Makes a network namespace for each HOST, with the one interface eth0 (a TUN device), and carries IPv4 packets between
 * them with delay, rate and loss. Nothing of it has a name in the file system: when the hub ends, it kills what still
 * runs in the namespaces, and with that they are gone. It ends when its input does, so it cannot outlive the program
 * that started it.
 *
 * A HOST is ADDRESS, in the public network; or ADDRESS@R, in the network 192.168.1.0/24 behind host R,
 * which is a router. A router is rADDRESS or rADDRESS@R, its address towards the others; in its namespace it has
 * 192.168.1.1, towards those behind it. What it does with their addresses is in nat.h.
 *
 * Says "ready REALTIME FD FD ..." (whether it has real-time priority; descriptors of the namespaces by host), then
 * reads commands, one a line, and answers each with "ok" or "error ...". Hosts are numbers from 0; a value of "-" unsets.
 *     access H DELAY_MS RATE_MBIT LOSS_PERCENT   host H's own link: its traffic with every host
 *     delay A B MS | rate A B MBIT | loss A B PERCENT    of packets from A to B only, instead of what access says
 *     cut A B      drops everything from A to B
 *     down H       drops everything from and to H
 *     up H         ends that
 *     heal         ends all cuts, and all hosts are up
 *     nat R MAPPING FILTERING PORTS HAIRPIN REFUSE UDP_S TCP_S    what router R does; it forgets its mappings
 *     forward R PROTOCOL PORT H PORT    leads a port of router R to one of host H behind it; PROTOCOL is 6 or 17
 *     unforward R PROTOCOL PORT         ends that
 * A rate of 0 is no limit. Without a value of its own, a pair has the sum of both access delays, and both losses.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <math.h>
#include <net/if.h>
#include <net/route.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "nat.h"

enum { MAX_HOSTS = 64, MAX_PACKET = 2048, MTU = 1500, BURST = 64, TIMER = 1000, COMMANDS = 1001 };

/* Who sends faster than a link's rate fills its buffer; beyond 200 ms of backlog packets are dropped. */
static const uint64_t BUFFER_NS = 200000000;

/* A place where packets wait for each other: one bit after the other at `ns_per_byte`. */
typedef struct {
    double ns_per_byte;
    uint64_t free_at;
} Queue;

/* The network behind each router, and where in it the router is. */
static const uint32_t PRIVATE = 0xc0a80100, GATEWAY = PRIVATE + 1; /* 192.168.1.0/24 */

typedef struct {
    double delay_ns, loss;
    Queue out, in;
} Access;

typedef struct {
    int tun, namespace;
    bool up;
    int behind;       /* a router's number; -1: it is public */
    uint32_t address; /* in that network */
    Nat *nat;         /* what makes it a router */
    Access access;    /* its link to that network */
} Host;

typedef struct {
    bool cut;
    double delay_ns, loss, rate_mbit; /* NAN: as the two hosts' access links say */
    Queue queue;
} Pair;

typedef struct {
    uint64_t due, order;
    int from, to, length;
    bool received; /* it is through the receiver's own link */
    unsigned char *bytes;
} Packet;

static int hosts;
static Host host[MAX_HOSTS];
static Access inside; /* the link of a router to those behind it: there is nothing to it */
static Pair pair[MAX_HOSTS][MAX_HOSTS];

/* Packets under way, a heap with the earliest on top. */
static Packet *heap;
static size_t under_way, heap_size;
static uint64_t sent;

static void kill_all(void);

static void fail(const char *what) {
    printf("error %s: %s\n", what, strerror(errno));
    kill_all();
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static bool earlier(const Packet *a, const Packet *b) {
    return a->due < b->due || (a->due == b->due && a->order < b->order);
}

static void swap(size_t a, size_t b) {
    Packet packet = heap[a];
    heap[a] = heap[b];
    heap[b] = packet;
}

static void push(Packet packet) {
    if (under_way == heap_size) {
        heap_size = heap_size ? 2 * heap_size : 1024;
        heap = realloc(heap, heap_size * sizeof *heap);
        if (!heap) fail("memory");
    }
    size_t i = under_way++;
    heap[i] = packet;
    for (; i && earlier(&heap[i], &heap[(i - 1) / 2]); i = (i - 1) / 2) swap(i, (i - 1) / 2);
}

static Packet pop(void) {
    Packet top = heap[0];
    heap[0] = heap[--under_way];
    for (size_t i = 0;;) {
        size_t least = i;
        for (size_t child = 2 * i + 1; child <= 2 * i + 2; child++)
            if (child < under_way && earlier(&heap[child], &heap[least])) least = child;
        if (least == i) return top;
        swap(i, least);
        i = least;
    }
}

/* When a packet that reaches a queue at `at` has left it; 0 if the queue is full. */
static uint64_t through(Queue *queue, uint64_t at, int length) {
    if (queue->ns_per_byte == 0) return at;
    uint64_t start = at > queue->free_at ? at : queue->free_at;
    if (start - at > BUFFER_NS) return 0;
    return queue->free_at = start + (uint64_t)(length * queue->ns_per_byte);
}

static bool connected(int from, int to) { return host[from].up && host[to].up && !pair[from][to].cut; }

static Access *access_towards(int from, int to) {
    return host[to].behind == from ? &inside : &host[from].access;
}

/* Sends a packet that is at `from` at a time over the link to another host of a network in which both are. */
static void carry(int from, int to, const unsigned char *bytes, int length, uint64_t at) {
    if (!connected(from, to)) return;
    Pair *own = &pair[from][to];
    Access *near = access_towards(from, to), *far = access_towards(to, from);
    double loss = isnan(own->loss) ? 1 - (1 - near->loss) * (1 - far->loss) : own->loss;
    if (loss > 0 && drand48() < loss) return;
    uint64_t gone = through(isnan(own->rate_mbit) ? &near->out : &own->queue, at, length);
    if (!gone) return;
    double delay = isnan(own->delay_ns) ? near->delay_ns + far->delay_ns : own->delay_ns;
    Packet packet = {gone + (uint64_t)delay, sent++, from, to, length, !isnan(own->rate_mbit), malloc(length)};
    if (!packet.bytes) fail("memory");
    memcpy(packet.bytes, bytes, length);
    push(packet);
}

static bool is_multicast(uint32_t address) { return address >> 28 == 14; }

/* Sends a packet within the public network (-1) or that behind a router: to whom it is for, or else to the router. */
static void send_within(int network, int from, const unsigned char *bytes, int length, uint64_t at) {
    uint32_t address = get32(bytes + 16);
    bool to_all = network >= 0 && is_multicast(address);
    if (network >= 0 && !to_all && (address & 0xffffff00) != PRIVATE) {
        if (network != from) carry(from, network, bytes, length, at);
        return;
    }
    for (int to = 0; to < hosts; to++) {
        uint32_t theirs = to == network ? GATEWAY : host[to].behind == network ? host[to].address : 0;
        if (to != from && theirs && (to_all || theirs == address)) carry(from, to, bytes, length, at);
    }
}

static void send_packet(int from, const unsigned char *bytes, int length) {
    /* IPv4 only; the kernels also say things in IPv6. */
    if (length < 20 || bytes[0] >> 4 != 4) return;
    send_within(host[from].nat ? from : host[from].behind, from, bytes, length, now_ns());
}

/* True if a router takes a packet for another network, and does with it what it does, instead of its own namespace. */
static bool route(int router, int from, unsigned char *bytes, int length, uint64_t at) {
    Nat *nat = host[router].nat;
    unsigned char answer[40];
    bool going_out = host[from].behind == router;
    uint32_t address = get32(bytes + 16);
    if (going_out && (address == GATEWAY || is_multicast(address))) return false;
    if (!going_out && address != nat->address) return true;
    if (going_out) {
        if (address == nat->address && !nat->hairpin) return true;
        if (!translate_out(nat, bytes, length, at)) return true;
        if (address != nat->address) {
            send_within(host[router].behind, router, bytes, length, at);
            return true;
        }
    }
    if (translate_in(nat, bytes, length, at)) send_within(router, router, bytes, length, at);
    else if (!going_out && nat->reset && refuse_syn(bytes, length, answer))
        send_within(host[router].behind, router, answer, sizeof answer, at);
    return true;
}

/* The receiver's link takes packets as they arrive, so it is asked then: their senders are at different distances. */
static void deliver_due(void) {
    while (under_way && heap[0].due <= now_ns()) {
        Packet packet = pop();
        bool kept = connected(packet.from, packet.to);
        if (kept && !packet.received) {
            packet.received = true;
            uint64_t arrived = packet.due;
            /* The sender's link has spread the packets out already; an idle receiver does not do so again. */
            Queue *in = &access_towards(packet.to, packet.from)->in;
            if (in->free_at <= arrived) {
                in->free_at = arrived + (uint64_t)(packet.length * in->ns_per_byte);
            } else if ((packet.due = through(in, arrived, packet.length)) > arrived) {
                push(packet);
                continue;
            } else {
                kept = packet.due != 0;
            }
        }
        Host *to = &host[packet.to];
        if (kept && !(to->nat && route(packet.to, packet.from, packet.bytes, packet.length, packet.due)) &&
            /* A full receiver drops, as a network card does. */
            write(to->tun, packet.bytes, packet.length) < 0 && errno != EAGAIN && errno != ENOBUFS)
            fail("write to a host");
        free(packet.bytes);
    }
}

static double ns_per_byte(double mbit) { return mbit > 0 ? 8000 / mbit : 0; }

/* A number at least 0, or NAN for "-"; false if it is neither. */
static bool number(const char *text, double *value) {
    char *end;
    *value = strcmp(text, "-") ? strtod(text, &end) : NAN;
    return !strcmp(text, "-") || (end != text && !*end && *value >= 0 && isfinite(*value));
}

/* A command to a router, and the numbers after the router's. */
static const char *obey_nat(int router, const char *what, const double *value, int values) {
    Nat *nat = host[router].nat;
    if (values == 7 && !strcmp(what, "nat") && value[0] < KINDS && value[1] < KINDS) {
        nat->mapping = value[0], nat->filtering = value[1];
        nat->random_ports = value[2], nat->hairpin = value[3], nat->reset = value[4];
        nat->udp_idle_ns = value[5] * 1e9, nat->tcp_idle_ns = value[6] * 1e9;
        memset(nat->session, 0, sizeof nat->session);
        return NULL;
    }
    bool forwards = values == 4 && !strcmp(what, "forward");
    if (!forwards && (values != 2 || strcmp(what, "unforward"))) return "no such command";
    if (value[0] < 1 || value[0] > 255 || value[1] < 1 || value[1] > 65535) return "no such protocol or port";
    Forward *forward = find_forward(nat, value[0], value[1]);
    if (!forwards) {
        if (!forward) return "the port is not forwarded";
        *forward = (Forward){0};
        return NULL;
    }
    if (value[2] >= hosts || host[(int)value[2]].behind != router || value[3] < 1 || value[3] > 65535)
        return "no such port, or the host is not behind the router";
    uint32_t address = host[(int)value[2]].address;
    if (forward && (forward->address != address || forward->port != value[3])) return "the port is forwarded already";
    if (!forward && !(forward = find_forward(nat, 0, 0))) return "too many forwarded ports";
    *forward = (Forward){value[0], value[1], value[3], address};
    return NULL;
}

static const char *obey(char *line) {
    char word[9][32] = {{0}};
    int words = sscanf(line, "%31s %31s %31s %31s %31s %31s %31s %31s %31s", word[0], word[1], word[2], word[3], word[4],
                       word[5], word[6], word[7], word[8]);
    const char *what = word[0];
    int a = words > 1 && isdigit(*word[1]) ? atoi(word[1]) : -1;
    int b = words > 2 && isdigit(*word[2]) ? atoi(word[2]) : -1;
    bool one = a >= 0 && a < hosts, two = one && b >= 0 && b < hosts && a != b;
    double value[7] = {0};
    if (one && host[a].nat && (!strcmp(what, "nat") || strstr(what, "forward"))) {
        for (int i = 2; i < words; i++)
            if (!number(word[i], &value[i - 2]) || isnan(value[i - 2])) return "a router needs numbers";
        return obey_nat(a, what, value, words - 2);
    } else if (words == 1 && !strcmp(what, "heal")) {
        for (int i = 0; i < hosts; i++) {
            host[i].up = true;
            for (int j = 0; j < hosts; j++) pair[i][j].cut = false;
        }
    } else if (words == 2 && one && (!strcmp(what, "up") || !strcmp(what, "down"))) {
        host[a].up = !strcmp(what, "up");
    } else if (words == 3 && two && !strcmp(what, "cut")) {
        pair[a][b].cut = true;
    } else if (words == 5 && one && !strcmp(what, "access")) {
        for (int i = 0; i < 3; i++)
            if (!number(word[2 + i], &value[i]) || isnan(value[i])) return "an access link needs numbers";
        Access *access = &host[a].access;
        access->delay_ns = value[0] * 1e6;
        access->out.ns_per_byte = access->in.ns_per_byte = ns_per_byte(value[1]);
        access->loss = value[2] / 100;
    } else if (words == 4 && two && number(word[3], &value[0])) {
        Pair *own = &pair[a][b];
        if (!strcmp(what, "delay")) {
            own->delay_ns = value[0] * 1e6;
        } else if (!strcmp(what, "loss")) {
            own->loss = value[0] / 100;
        } else if (!strcmp(what, "rate")) {
            own->rate_mbit = value[0];
            own->queue.ns_per_byte = isnan(value[0]) ? 0 : ns_per_byte(value[0]);
        } else {
            return "no such command";
        }
    } else {
        return "no such command, or no such host";
    }
    return NULL;
}

/* Obeys the complete lines that came; false at the end of the input. */
static bool read_commands(void) {
    static char text[4096];
    static size_t length;
    ssize_t count = read(STDIN_FILENO, text + length, sizeof text - 1 - length);
    if (count <= 0) return count < 0 && (errno == EAGAIN || errno == EINTR);
    length += count;
    text[length] = 0;
    char *line = text;
    for (char *end; (end = strchr(line, '\n')); line = end + 1) {
        *end = 0;
        const char *error = obey(line);
        if (error) printf("error %s: %s\n", error, line);
        else printf("ok\n");
    }
    length -= line - text;
    memmove(text, line, length);
    return length < sizeof text - 1;
}

static void configure(int i) {
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {.ifr_name = "eth0", .ifr_mtu = MTU};
    struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
    if (control < 0 || ioctl(control, SIOCSIFMTU, &request)) fail("set the MTU");
    memset(&request.ifr_ifru, 0, sizeof request.ifr_ifru);
    request.ifr_qlen = 1000;
    ioctl(control, SIOCSIFTXQLEN, &request); /* more than the usual 500 for bursts; refused in a user namespace */
    memset(&request.ifr_ifru, 0, sizeof request.ifr_ifru);
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(host[i].nat ? GATEWAY : host[i].address);
    if (ioctl(control, SIOCSIFADDR, &request)) fail("set the address");
    address->sin_addr.s_addr = htonl(0xffffff00);
    if (ioctl(control, SIOCSIFNETMASK, &request)) fail("set the netmask");
    for (int loopback = 0; loopback < 2; loopback++) {
        strcpy(request.ifr_name, loopback ? "lo" : "eth0");
        if (ioctl(control, SIOCGIFFLAGS, &request)) fail("read the flags");
        request.ifr_flags |= IFF_UP;
        if (ioctl(control, SIOCSIFFLAGS, &request)) fail("bring the interface up");
    }
    if (host[i].behind >= 0 && !host[i].nat) {
        struct rtentry way = {.rt_flags = RTF_UP | RTF_GATEWAY};
        struct sockaddr_in gateway = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(GATEWAY)};
        way.rt_dst.sa_family = way.rt_genmask.sa_family = AF_INET;
        memcpy(&way.rt_gateway, &gateway, sizeof gateway);
        if (ioctl(control, SIOCADDRT, &way)) fail("set the way to the router");
    }
    close(control);
}

/* Makes the host that an argument tells of; see above. */
static void make_host(int i, char *argument) {
    struct ifreq request = {.ifr_name = "eth0", .ifr_flags = IFF_TUN | IFF_NO_PI};
    bool router = *argument == 'r';
    char *behind = strchr(argument, '@');
    if (behind) *behind = 0;
    host[i].behind = behind ? atoi(behind + 1) : -1;
    if (inet_pton(AF_INET, argument + router, &host[i].address) != 1) fail("read an address");
    host[i].address = ntohl(host[i].address);
    if (router && !(host[i].nat = calloc(1, sizeof(Nat)))) fail("memory");
    if (router) host[i].nat->address = host[i].address;
    if (unshare(CLONE_NEWNET)) fail("make a network namespace");
    host[i].namespace = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    host[i].tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (host[i].namespace < 0) fail("open a network namespace");
    if (host[i].tun < 0 || ioctl(host[i].tun, TUNSETIFF, &request)) fail("/dev/net/tun");
    configure(i);
    host[i].up = true;
    for (int j = 0; j < hosts; j++) pair[i][j].delay_ns = pair[i][j].loss = pair[i][j].rate_mbit = NAN;
}

static bool in_the_lab(const char *process) {
    char path[64];
    struct stat theirs, ours;
    snprintf(path, sizeof path, "/proc/%.20s/ns/net", process);
    if (stat(path, &theirs)) return false;
    for (int i = 0; i < hosts; i++)
        if (!fstat(host[i].namespace, &ours) && ours.st_ino == theirs.st_ino && ours.st_dev == theirs.st_dev) return true;
    return false;
}

/* Kills what runs in the hosts, again until a look finds nobody: who was found may just have forked. */
static void kill_all(void) {
    for (int round = 0, found = 1; found && round < 1000; round++) {
        DIR *processes = opendir("/proc");
        found = 0;
        for (struct dirent *entry; processes && (entry = readdir(processes));) {
            int process = atoi(entry->d_name);
            if (process <= 0 || process == getpid() || process == getppid() || !in_the_lab(entry->d_name)) continue;
            kill(process, SIGKILL);
            found = 1;
        }
        if (processes) closedir(processes);
        if (found) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

int main(int count, char **arguments) {
    hosts = count - 1;
    if (hosts < 1 || hosts > MAX_HOSTS) {
        printf("error a lab has 1 to %d hosts and routers\n", MAX_HOSTS);
        return 1;
    }
    /* Only the end of the input ends the hub: Ctrl-C reaches everything in a terminal, and the hub must be last. */
    signal(SIGINT, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_TIMERSLACK, 1);
    int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    int events = epoll_create1(EPOLL_CLOEXEC), timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    if (home < 0 || events < 0 || timer < 0) fail("start");
    for (int i = 0; i < hosts; i++) {
        make_host(i, arguments[i + 1]);
        event.data.u32 = i;
        if (epoll_ctl(events, EPOLL_CTL_ADD, host[i].tun, &event)) fail("watch a host");
    }
    if (setns(home, CLONE_NEWNET)) fail("return");
    fcntl(STDIN_FILENO, F_SETFL, fcntl(STDIN_FILENO, F_GETFL) | O_NONBLOCK);
    event.data.u32 = TIMER;
    epoll_ctl(events, EPOLL_CTL_ADD, timer, &event);
    event.data.u32 = COMMANDS;
    if (epoll_ctl(events, EPOLL_CTL_ADD, STDIN_FILENO, &event)) fail("watch the input");
    /* With real-time priority packets are on time however busy the machine is. */
    bool realtime = !sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 5});
    mlockall(MCL_CURRENT | MCL_FUTURE);
    srand48(1);
    printf("ready %d", realtime);
    for (int i = 0; i < hosts; i++) printf(" %d", host[i].namespace);
    printf("\n");

    unsigned char bytes[MAX_PACKET];
    for (bool open = true; open;) {
        deliver_due();
        struct itimerspec alarm = {0};
        if (under_way) {
            alarm.it_value.tv_sec = heap[0].due / 1000000000;
            alarm.it_value.tv_nsec = heap[0].due % 1000000000;
        }
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &alarm, NULL);
        struct epoll_event ready[16];
        int many = epoll_wait(events, ready, 16, -1);
        for (int i = 0; i < many; i++) {
            unsigned source = ready[i].data.u32;
            uint64_t expirations;
            if (source == TIMER) {
                if (read(timer, &expirations, sizeof expirations) < 0 && errno != EAGAIN) fail("timer");
            } else if (source == COMMANDS) {
                open = read_commands();
            } else {
                ssize_t length;
                for (int k = 0; k < BURST && (length = read(host[source].tun, bytes, sizeof bytes)) > 0; k++)
                    send_packet(source, bytes, length);
            }
        }
    }
    kill_all();
    return 0;
}
