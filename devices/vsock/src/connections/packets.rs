//! What the packets of the guest do.

use anemone_log::warn_limited;
use libc::iovec;

use super::Connections;
use crate::packet::{HOST_CID, Header, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_STREAM, op};
use crate::parts;
use crate::state::{RESETS, SLOTS, State, flag, phase};

/// A packet of the guest.
pub struct Incoming<'a> {
    /// Its header.
    pub header: Header,
    /// What follows the header.
    pub payload: &'a mut Vec<iovec>,
    /// The chain.
    pub head: u16,
    /// The ring's used index.
    pub used: u16,
    /// An earlier process had taken the chain already.
    pub again: bool,
}

impl Connections {
    /// Handles a packet.
    pub fn take_packet(&mut self, mut packet: Incoming<'_>) {
        let header = packet.header;
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            warn_limited!(
                "a packet from {} to {} was dropped: {} may send to {HOST_CID}",
                header.src_cid,
                header.dst_cid,
                self.cid
            );
            return;
        }
        let ports = (header.src_port, header.dst_port);
        let found = self.ports.get(&ports).copied();
        if header.kind != TYPE_STREAM {
            self.refuse(&header);
            return;
        }
        let Some(number) = found else {
            match header.op {
                op::REQUEST => self.request(&header),
                _ => self.refuse(&header),
            }
            return;
        };
        let slot = self.slot(number);
        slot.guest_buffer.set(header.buf_alloc);
        slot.guest_taken.set(header.fwd_cnt);
        slot.flags.remove(flag::ASKED);
        let open = slot.phase.get() == phase::OPEN;
        let sound = match header.op {
            op::RESPONSE if slot.phase.get() == phase::OPENING => {
                self.response(number);
                true
            }
            // The same packet once more is no news.
            op::REQUEST | op::RESPONSE if packet.again => true,
            op::RST => {
                self.guest_reset(number);
                return;
            }
            op::SHUTDOWN if open => {
                let bits = header.flags & (SHUTDOWN_RCV | SHUTDOWN_SEND);
                // The flags of a connection begin with those of the packet.
                slot.flags.add(bits);
                self.settle(number);
                return;
            }
            op::RW if open => self.take_data(number, &mut packet),
            op::CREDIT_UPDATE => true,
            op::CREDIT_REQUEST => {
                self.wish(number, flag::WANT_UPDATE);
                true
            }
            _ => false,
        };
        if !sound {
            self.close(number, true);
            return;
        }
        self.offer_data(number);
    }

    /// One refusal for a packet that does not fit, none for a refusal.
    fn refuse(&self, header: &Header) {
        if header.op != op::RST && self.state.resets() < RESETS {
            self.state
                .push_reset(header.src_port, header.dst_port, header.kind);
        }
    }

    /// The guest wants to connect.
    fn request(&mut self, header: &Header) {
        let Some(number) = self.allocate() else {
            warn_limited!("a connection of the guest was refused: {SLOTS} are open");
            self.refuse(header);
            return;
        };
        let slot = self.slot(number);
        slot.guest_port.set(header.src_port);
        slot.host_port.set(header.dst_port);
        slot.guest_buffer.set(header.buf_alloc);
        slot.guest_taken.set(header.fwd_cnt);
        slot.phase.set(phase::DIALING);
        self.ports
            .insert((header.src_port, header.dst_port), number);
        self.dials.push_back(number);
    }

    /// The guest has accepted the connection of a client, which is told so.
    fn response(&mut self, number: u16) {
        let slot = self.slot(number);
        let line = format!("OK {}\n", slot.host_port.get());
        let mut bytes = line.into_bytes();
        let length = bytes.len() as u64;
        let target = self.state.pieces(number, 0, length);
        // SAFETY: the pieces of the state's buffer and of the vector.
        unsafe { parts::copy(&[parts::of(&mut bytes)], &target) };
        slot.preface.set(length as u32);
        slot.taken.set(length);
        slot.phase.set(phase::OPEN);
        if let Some(socket) = self.socket(number) {
            socket.buffered = true;
        }
        self.flush(number);
    }

    /// The guest has forgotten the connection.
    fn guest_reset(&mut self, number: u16) {
        let slot = self.slot(number);
        let closed = slot.phase.get() == phase::OPEN && slot.flags.has(flag::GUEST_SEND);
        if !closed || slot.backlog() == 0 {
            self.close(number, false);
            return;
        }
        // It had closed in good order; the host's program reads slowly.
        let ports = (slot.guest_port.get(), slot.host_port.get());
        slot.phase.set(phase::LINGER);
        self.ports.remove(&ports);
    }

    /// Takes data for the socket; false if the guest may not send it.
    fn take_data(&mut self, number: u16, packet: &mut Incoming<'_>) -> bool {
        let length = packet.header.len as usize;
        if length > parts::total(packet.payload) {
            return false;
        }
        parts::truncate(packet.payload, length);
        let mark = self.state.packet();
        let slot = self.state.slot(number);
        let mut base = slot.taken.get();
        let same = packet.again
            && mark.active.get() != 0
            && mark.slot.get() == u32::from(number)
            && mark.head.get() == u32::from(packet.head)
            && mark.used.get() == u32::from(packet.used);
        if same && base != mark.base.get() {
            // It had all been taken when the earlier process ended.
            return true;
        }
        if slot.flags.has(flag::GUEST_SEND) {
            return false;
        }
        let unsent = base - slot.sent.get().max(slot.preface.get().into()).min(base);
        if unsent + length as u64 > u64::from(State::buffer(number)) {
            return false;
        }
        if !same {
            mark.active.set(0);
            // Only a packet that is taken again has been sent in part.
            base = base.max(slot.sent.get());
            slot.taken.set(base);
            mark.head.set(packet.head.into());
            mark.used.set(packet.used.into());
            mark.slot.set(number.into());
            mark.base.set(base);
            mark.active.set(1);
        }
        let end = base + length as u64;
        let sent = slot.sent.get();
        if sent >= base {
            parts::skip(packet.payload, (sent - base) as usize);
            let socket = &self.sockets[usize::from(number)];
            let writable = socket.as_ref().is_some_and(|socket| socket.writable);
            if writable && sent < end && !slot.flags.has(flag::HOST_RCV) {
                let moved = self.send(number, packet.payload);
                parts::skip(packet.payload, moved);
            }
        }
        let slot = self.state.slot(number);
        if slot.flags.has(flag::HOST_RCV) {
            slot.sent.set(end);
        } else {
            let from = slot.sent.get().max(base);
            let target = self.state.pieces(number, from, end);
            // SAFETY: pieces of guest memory, which stays mapped, and of the state's buffer.
            unsafe { parts::copy(packet.payload, &target) };
            if from < end
                && let Some(socket) = &mut self.sockets[usize::from(number)]
            {
                socket.buffered = true;
            }
        }
        slot.taken.set(end);
        // A socket that took a part has to say that it takes no more.
        self.flush(number);
        true
    }
}
