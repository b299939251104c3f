//! What an earlier process has left, and the end of a front end.

use std::os::fd::{AsFd, OwnedFd};

use anemone_log::warn_limited;

use super::{Connections, STATE_KEY, Socket, socket_key};
use crate::packet::TYPE_STREAM;
use crate::state::{RESETS, SLOTS, flag, phase, receiving};
use crate::sys;

impl Connections {
    /// Takes over what an earlier process has left, before the first ring of a front end starts.
    /// True if there is nothing: a guest that has connections has lost them.
    pub fn take_over(&mut self) -> bool {
        let mut sockets = std::mem::take(&mut self.restored_sockets);
        let found = match self.restored.take() {
            Some(state) => {
                self.state = state;
                self.kept = true;
                true
            }
            None => false,
        };
        if found {
            self.finish_transfers();
            let count = (0..SLOTS as u16)
                .rev()
                .find(|&number| self.slot(number).phase.get() != phase::FREE)
                .map_or(0, |number| usize::from(number) + 1);
            for number in 0..count as u16 {
                let fd = sockets.remove(&socket_key(number));
                self.take_over_slot(number, fd);
            }
        }
        // What belongs to no connection: the process ended between two steps.
        for (key, fd) in sockets {
            sys::shut_down(fd.as_fd(), libc::SHUT_RDWR);
            if let Some(host) = &self.host {
                host.forget(key);
            }
        }
        if !self.kept
            && let Some(host) = &self.host
        {
            match host.keep(STATE_KEY, self.state.file()) {
                Ok(()) => self.kept = true,
                Err(error) => log::warn!("connections will not survive this process: {error}"),
            }
        }
        !found
    }

    /// Counts the bytes that the kernel had moved when the earlier process ended.
    fn finish_transfers(&self) {
        let mark = self.state.send();
        if let Some(number) = mark.active.get().checked_sub(1)
            && (number as usize) < SLOTS
        {
            let slot = self.slot(number as u16);
            let moved = mark.moved().unwrap_or(0);
            slot.sent.set(mark.base.get().saturating_add(moved.into()));
        }
        mark.active.set(0);
        let mark = self.state.receive();
        let number = mark.slot.get();
        if (number as usize) >= SLOTS {
            mark.what.set(receiving::NOTHING);
            return;
        }
        let slot = self.slot(number as u16);
        match mark.what.get() {
            receiving::DATA => slot
                .to_guest
                .set(mark.base.get().wrapping_add(mark.total())),
            receiving::LINE => {
                slot.line.set(mark.base.get().saturating_sub(mark.total()));
                mark.what.set(receiving::NOTHING);
            }
            // The ring says whether the packet is there.
            _ => {}
        }
    }

    fn take_over_slot(&mut self, number: u16, fd: Option<OwnedFd>) {
        self.sockets.push(None);
        let slot = self.state.slot(number);
        let ports = (slot.guest_port.get(), slot.host_port.get());
        let current = slot.phase.get();
        let named = matches!(current, phase::OPENING | phase::DIALING | phase::OPEN);
        let needs_fd = !matches!(current, phase::FREE | phase::DIALING);
        let sound = self.state.check(number)
            && (fd.is_some() || !needs_fd)
            && !(named && self.ports.contains_key(&ports));
        if current == phase::FREE || !sound {
            if current != phase::FREE {
                warn_limited!("connection {number} of the earlier process is not usable");
                if named && self.state.resets() < RESETS {
                    self.state.push_reset(ports.0, ports.1, TYPE_STREAM);
                }
                slot.phase.set(phase::FREE);
                self.state.release_buffer(number);
            }
            self.free.insert(number);
            if let (Some(fd), Some(host)) = (fd, &self.host) {
                sys::shut_down(fd.as_fd(), libc::SHUT_RDWR);
                host.forget(socket_key(number));
            }
            return;
        }
        self.sockets[usize::from(number)] = Some(Socket {
            buffered: true,
            ..Socket::default()
        });
        if named {
            self.ports.insert(ports, number);
        }
        match (current, fd) {
            (phase::DIALING, None) => {
                self.dials.push_back(number);
                return;
            }
            (phase::DIALING, Some(fd)) => self.connected(number, fd),
            (_, Some(fd)) => self.watch(number, fd),
            (_, None) => return,
        }
        match current {
            phase::HELLO => self.hellos.push_back(number),
            phase::OPEN => self.wish(number, flag::WANT_UPDATE),
            _ => {}
        }
        if self.slot(number).flags.has(flag::WANTS) {
            self.wish(number, 0);
        }
        if matches!(current, phase::OPEN | phase::LINGER) {
            self.flush(number);
        }
    }

    /// Ends all connections without a word to the guest.
    pub fn forget_all(&mut self) {
        for number in self.in_use() {
            self.close(number, false);
        }
        self.state.clear();
        self.control.clear();
        self.data.clear();
        self.hellos.clear();
        self.dials.clear();
    }
}
